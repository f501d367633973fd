"""A task's part of the data, tokenised: its tokens, a table of its documents, and what was no document."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy
from datatrove.pipeline.base import PipelineStep

from megatron_router_upcycling.data import readers
from megatron_router_upcycling.data.record import Options
from megatron_router_upcycling.data.tokenizer import Tokenizer
from megatron_router_upcycling.errors import UserError, error_as, os_error_as
from megatron_router_upcycling.files import write_whole

SAMPLED = 1 << 14  # characters of a part for which tiktoken's tokens are compared with those of tokenizers
LISTED = 1000  # bad documents whose places are kept


@dataclass
class Counts:
    """What became no document: of a part, or of all parts so far in the order of the text."""

    empty: int = 0
    bad_count: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)  # the first of them, as the record has them
    rows: Counter[str] = field(default_factory=Counter)  # of each file, bad and empty ones too
    tiktoken_differs: int = 0  # parts

    def add(self, part: Self, allowed: int) -> None:
        """Count a part. More bad documents than ``allowed`` are a UserError, which names the first."""
        for bad in part.bad[: LISTED - len(self.bad)]:
            for unit in {"line", "row"} & bad.keys():
                bad[unit] += self.rows[bad["file"]]
            self.bad.append(bad)
        self.rows.update(part.rows)
        self.empty += part.empty
        self.bad_count += part.bad_count
        self.tiktoken_differs += part.tiktoken_differs
        if self.bad_count > allowed:
            file, *place, (_, why) = self.bad[0].items()
            where = " ".join(map(str, [file[1], *chain(*place)]))
            raise UserError(
                f"SOURCE {where}: {why}; fix it, or pass --max-bad N to leave out up to N such documents"
                f" ({self.bad_count} so far)"
            )


class Tokenise(PipelineStep):
    """Reads a task's documents and writes its part. Slurm's tasks get it pickled."""

    type, name = "Tokeniser", "Tokenise"

    def __init__(self, tasks: list[readers.Task], options: Options, made: Tokenizer, tiktoken: bool) -> None:
        super().__init__()
        self.tasks, self.options, self.tokenizer, self.tiktoken = tasks, options, made, tiktoken

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        path = self.options.work / f"{rank:07d}.tokens"
        partial, content, counts = path.with_suffix(f".{os.getpid()}"), io.BytesIO(), Counts()
        with os_error_as(f"--output {path}: cannot be written", "; make room"):
            try:
                with partial.open("wb") as file:
                    table = list(self._write_tokens(rank, file, counts))
                rows = numpy.array(table, dtype=numpy.int64).reshape(-1, 3)
                numpy.savez(content, table=rows, counts=json.dumps(vars(counts)))
                write_whole(path.with_suffix(".npz"), content.getvalue())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _write_tokens(self, rank: int, file: Any, counts: Counts) -> Iterator[tuple[int, int, bool]]:
        """Write the tokens of a part's documents; each one's row in the table (see ``load``)."""
        options, dtype = self.options, self.tokenizer.dtype
        end = self.tokenizer.end_of_document if options.end_of_document else None
        ends = [] if end is None else [end]
        slow = self.tokenizer.encoder()
        encode = self.tokenizer.encoder(tiktoken=True) if self.tiktoken else slow
        compared = 0 if self.tiktoken else SAMPLED
        for text in documents(self.tasks[rank], options, counts):
            ids = encode(text)
            if compared < SAMPLED:
                compared += len(text)
                if list(ids) != list(slow(text)):
                    counts.tiktoken_differs, compared = 1, SAMPLED
                    encode, ids = slow, slow(text)
            if not len(ids):
                counts.empty += 1
                continue
            file.write(numpy.asarray(ids, dtype))
            file.write(numpy.asarray(ends, dtype))
            held_out = is_held_out(text, options.held_out, options.seed)
            yield len(ids) + len(ends), readers.size_of(text), held_out


def documents(task: readers.Task, options: Options, counts: Counts) -> Iterator[str]:
    """The texts of a task in order, without those that are empty or bad, which are counted."""
    for piece in task:
        path, unit = piece.source.path, readers.UNITS.get(piece.source.kind, "row")
        for row, (text, why) in enumerate(readers.read(piece, options), 1):
            counts.rows[path] = row  # a task holds no two pieces of a file
            if text:
                yield text
            elif not why:
                counts.empty += 1
            else:
                counts.bad_count += 1
                if counts.bad_count <= LISTED:
                    counts.bad.append({"file": path, **({unit: row} if unit else {}), "why": why})


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept from training: decided by its own text alone, so that it stays where it is
    when others come or go, and copies of it never fall on both sides."""
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def load(folder: Path, rank: int, dtype: Any) -> tuple[Any, Any, Counts]:
    """A part's tokens [N]; table [D, 3] of documents: tokens, bytes, whether held out; and counts."""
    path = folder / f"{rank:07d}.npz"
    with error_as(Exception, f"{path}: was damaged", "; run the command again"):  # as a failing machine may
        with numpy.load(path, allow_pickle=False) as file:
            table, counts = file["table"], Counts(**json.loads(str(file["counts"])))
        count, tokens = int(table[:, 0].sum()), numpy.empty(0, dtype)
        if count:
            tokens = numpy.memmap(path.with_suffix(".tokens"), dtype, "r", shape=(count,))
    return tokens, table, counts
