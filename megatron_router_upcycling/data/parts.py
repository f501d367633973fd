"""A task's part of the data, tokenised: its tokens, a table of its documents, and what was no document."""

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_router_upcycling.data import encoders, readers
from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.data.tokenizer import optimal_dtype
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.files import write_whole

BATCH_BYTES = 1 << 20  # of text in one call of the tokenizer
BATCH_DOCUMENTS = 512
SAMPLED = 1 << 14  # bytes of text of a part for which two tokenizers are compared
LISTED = 1000  # bad documents whose places are kept


@dataclass(frozen=True)
class Job:
    """All that decides the parts: what a task finds in the folder where it writes its part."""

    sources: list[Source]
    tasks: list[list[readers.Piece]]
    limits: readers.Limits
    held_out: float  # share of the documents
    seed: int
    vocab_size: int
    end_of_document: int | None
    encode_special_tokens: bool
    tiktoken: bool  # whether it gives the tokens

    def save(self, folder: Path, definition: str | bytes) -> None:
        binary = isinstance(definition, bytes)
        write_whole(folder / ("tokenizer.model" if binary else "tokenizer.json"), definition)
        write_whole(folder / "job.json", json.dumps(asdict(self)))


@functools.cache
def load_job(folder: str) -> Job:
    """The job in ``folder``."""
    entries = json.loads(Path(folder, "job.json").read_bytes())
    entries["sources"] = [Source(**source) for source in entries["sources"]]
    entries["tasks"] = [[readers.Piece(**piece) for piece in task] for task in entries["tasks"]]
    return Job(**entries | {"limits": readers.Limits(**entries["limits"])})


@functools.cache
def _encoder(folder: str, tiktoken: bool) -> encoders.Encoder:
    """One for all parts that a process makes."""
    model = Path(folder, "tokenizer.model")
    definition = model.read_bytes() if model.is_file() else Path(folder, "tokenizer.json").read_text("utf-8")
    return encoders.of(definition, load_job(folder).encode_special_tokens, tiktoken)


@dataclass
class Summary:
    """What a part holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad_count: int = 0
    bad: list[tuple[int, int, str]] = field(default_factory=list)  # the first: piece, row in it, and why
    rows: list[int] = field(default_factory=list)  # of each piece, bad and empty ones too
    tiktoken_differs: bool = False


class Tokenise(PipelineStep):
    """Reads a task's documents and writes its part into ``folder``, which holds the job."""

    type, name = "Tokeniser", "Tokenise"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the task ``rank``.

        Raises:
            UserError: a file cannot be read, or the part cannot be written.
        """
        path = Path(self.folder, f"{rank:07d}.tokens")
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            with partial.open("wb") as file:
                part = _Part(self.folder, file)
                part.fill(rank)
            table = numpy.array(part.table, dtype=numpy.int64).reshape(-1, 3)
            summary: Any = numpy.frombuffer(json.dumps(asdict(part.summary)).encode(), dtype=numpy.uint8)
            with partial.with_suffix(".npz").open("wb") as file:
                numpy.savez(file, table=table, summary=summary)
            os.replace(partial.with_suffix(".npz"), path.with_suffix(".npz"))
            os.replace(partial, path)
        except OSError as error:
            raise UserError(
                f"--output: {self.folder} cannot be written ({reason(error)}); make room"
            ) from None
        finally:
            partial.unlink(missing_ok=True)


class _Part:
    """A part while it is made."""

    def __init__(self, folder: str, file: Any) -> None:
        self.summary, self.table = Summary(), list[tuple[int, int, bool]]()
        self._folder, self._file, self._job = folder, file, load_job(folder)
        self._encoder = _encoder(folder, self._job.tiktoken)
        self._compared = 0 if self._job.tiktoken else SAMPLED
        self._texts: list[str] = []
        self._waiting = 0

    def fill(self, rank: int) -> None:
        job = self._job
        for document in documents(job.sources, job.tasks[rank], job.limits, self.summary):
            self._texts.append(document.text)
            self._waiting += len(document.text)
            if self._waiting >= BATCH_BYTES or len(self._texts) >= BATCH_DOCUMENTS:
                self._write()
        self._write()

    def _write(self) -> None:
        if self._compared < SAMPLED:
            self._compare()
        job, summary, dtype = self._job, self.summary, optimal_dtype(self._job.vocab_size)
        end = numpy.array([] if job.end_of_document is None else [job.end_of_document], dtype)
        batch = []
        for text, ids in zip(self._texts, self._encoder.encode(self._texts), strict=True):
            if not len(ids):
                summary.empty += 1
                continue
            size = len(text) if text.isascii() else len(text.encode())
            batch += [numpy.asarray(ids, dtype), end]
            self.table.append((len(ids) + len(end), size, is_held_out(text, job.held_out, job.seed)))
            summary.documents += 1
            summary.tokens += len(ids) + len(end)
            summary.bytes += size
        if batch:
            self._file.write(numpy.concatenate(batch))
        self._texts.clear()
        self._waiting = 0

    def _compare(self) -> None:
        """Hold the tokens of some texts against those of ``tokenizers``, which takes over if they differ."""
        sample = self._texts[:8]
        self._compared += sum(map(len, sample))
        other = _encoder(self._folder, False).encode(sample)
        if [list(ids) for ids in self._encoder.encode(sample)] != other:
            self.summary.tiktoken_differs, self._compared = True, SAMPLED
            self._encoder = _encoder(self._folder, False)


def documents(
    sources: list[Source], task: list[readers.Piece], limits: readers.Limits, summary: Summary
) -> Iterator[Document]:
    """A task's documents in order, without those that are empty or bad, which ``summary`` counts.

    Raises:
        UserError: see ``readers.read``.
    """
    for number, piece in enumerate(task):
        summary.rows.append(0)
        for document in readers.read(sources[piece.source], piece, limits):
            summary.rows[-1] = document.metadata["row"]
            if why := document.metadata.get("bad"):
                summary.bad_count += 1
                if summary.bad_count <= LISTED:
                    summary.bad.append((number, summary.rows[-1], why))
            elif document.text:
                yield document
            else:
                summary.empty += 1


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept from training: decided by its own text alone.

    So a document stays where it is when others come or go, and copies of it never fall on both sides.
    """
    if not share:
        return False
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def load(folder: Path, rank: int, dtype: Any) -> tuple[Any, Any, Summary]:
    """A part's tokens [N]; its table [D, 3]: each document's tokens, bytes and whether it is held out; and
    its summary.

    Raises:
        UserError: a file was damaged, as a machine that fails may do.
    """
    path = folder / f"{rank:07d}.npz"
    try:
        with numpy.load(path, allow_pickle=False) as file:
            table, summary = file["table"], Summary(**json.loads(file["summary"].tobytes()))
        tokens = numpy.empty(0, dtype)
        if summary.tokens:
            tokens = numpy.memmap(path.with_suffix(".tokens"), dtype, "r", shape=(summary.tokens,))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: was damaged ({reason(error)}); remove {folder} and run the command again"
        ) from None
    return tokens, table, summary
