"""A part of the text, tokenised: one file, written whole, from which the data is put together."""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from megatron_router_upcycling.data.documents import Chunk, Limits, Skipped, read
from megatron_router_upcycling.data.tokenizer import Encoder, Tokenizer, optimal_dtype
from megatron_router_upcycling.errors import UserError, reason

BATCH_BYTES = 1 << 20  # of text in one call of the tokenizer
BATCH_DOCUMENTS = 512
LISTED = 1000  # bad documents whose places are kept


@dataclass(frozen=True)
class Summary:
    """What a part is about, or several that follow one another."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad: int = 0
    skipped: tuple[Skipped, ...] = ()  # the first of the bad

    def __add__(self, later: "Summary") -> "Summary":
        return Summary(
            self.documents + later.documents,
            self.tokens + later.tokens,
            self.bytes + later.bytes,
            self.empty + later.empty,
            self.bad + later.bad,
            (self.skipped + later.skipped)[:LISTED],
        )


@dataclass(frozen=True)
class Job:
    """How a worker makes parts."""

    tokenizer: Tokenizer
    limits: Limits
    held_out: float  # share of the documents
    seed: int
    end_of_document: int | None
    folder: Path

    def start(self) -> "Worker":
        return Worker(self)


class Worker:
    """Makes parts, in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder: Encoder = job.tokenizer.encoder()
        self._dtype = optimal_dtype(job.tokenizer.vocab_size)

    def __call__(self, part: tuple[int, list[Chunk]]) -> Summary:
        """Tokenise and write a part.

        Raises:
            UserError: a file of text cannot be read, or the part cannot be written.
        """
        number, chunks = part
        texts: list[str] = []
        sizes: list[int] = []
        skipped: list[Skipped] = []
        tokens: list[Any] = []
        rows: list[tuple[int, int, bool]] = []
        empty = bad = waiting = 0

        def encode() -> None:
            nonlocal empty, waiting
            for text, size, ids in zip(texts, sizes, self._encoder.encode(texts), strict=True):
                if not len(ids):
                    empty += 1
                    continue
                tokens.append(self._ended(ids))
                rows.append((len(tokens[-1]), size, self._is_held_out(text)))
            texts.clear()
            sizes.clear()
            waiting = 0

        for chunk in chunks:
            for found in read(chunk, self._job.limits):
                if isinstance(found, Skipped):
                    bad += 1
                    skipped += [found] if bad <= LISTED else []
                elif found[1]:
                    texts.append(found[0])
                    sizes.append(found[1])
                    waiting += found[1]
                    if waiting >= BATCH_BYTES or len(texts) >= BATCH_DOCUMENTS:
                        encode()
                else:
                    empty += 1
        encode()
        table = numpy.array(rows, dtype=numpy.int64).reshape(-1, 3)
        sums = table.sum(axis=0).tolist()
        summary = Summary(len(rows), sums[0], sums[1], empty, bad, tuple(skipped))
        flat = numpy.concatenate(tokens) if tokens else numpy.empty(0, self._dtype)
        _save(path_of(self._job.folder, number), flat, table, summary)
        return summary

    def _ended(self, ids: Any) -> Any:
        end = self._job.end_of_document
        count = len(ids)
        ended = ids if end is None else chain(ids, (end,))
        return numpy.fromiter(ended, self._dtype, count + (end is not None))

    def _is_held_out(self, text: str) -> bool:
        return is_held_out(text, self._job.held_out, self._job.seed)


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept from training: decided by its own text alone.

    So a document stays where it is when others come or go, and copies of it never fall on both sides.
    """
    if not share:
        return False
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.part"


def _save(path: Path, tokens: Any, table: Any, summary: Summary) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    skipped = [[bad.file, bad.unit, bad.number, bad.why] for bad in summary.skipped]
    entries = {**vars(summary), "skipped": skipped}
    try:
        with partial.open("wb") as file:
            numpy.savez(
                file,
                tokens=tokens,
                table=table,
                summary=numpy.frombuffer(json.dumps(entries).encode(), dtype=numpy.uint8),
            )
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--output: {path.parent} cannot be written ({reason(error)}); make room") from None


def summary_of(folder: Path, number: int) -> Summary | None:
    """What an earlier run has written about a part; None if it has not, or not whole."""
    try:
        with numpy.load(path_of(folder, number), allow_pickle=False) as file:
            entries = json.loads(file["summary"].tobytes())
        skipped = tuple(Skipped(*bad) for bad in entries.pop("skipped"))
        return Summary(**entries, skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def load(folder: Path, number: int) -> tuple[Any, Any]:
    """A part's tokens [N], and its table [D, 3]: each document's tokens, bytes and whether it is held out.

    Raises:
        UserError: the file was damaged, as a machine that fails may do.
    """
    path = path_of(folder, number)
    try:
        with numpy.load(path, allow_pickle=False) as file:
            return file["tokens"], file["table"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: was damaged ({reason(error)}); remove it and give the command again"
        ) from None
