"""What is written: files that begin with PREFIX, each pair of .bin and .idx whole or not there.

An index (.idx) comes after its tokens (.bin) and the record after both; where old data is replaced, its
record and index go first. So nobody reads half of one and half of another, whenever the machine stops.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync

# The header of an .idx file (megatron.core.datasets.indexed_dataset): a mark, version, code of the dtype, and
# how many sequences and document ends there are. Lengths (int32), places (int64) and ends (int64) follow.
MARK, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
DOCUMENTS = 1 << 14  # that are copied at a time
TOKENIZER = "tokenizer.model"
PUBLISHING = "publishing"  # stands in the folder of parts once old data may be gone


class Output:
    """A prefix in the making: the documents of training, or those that are held out.

    The bytes are those of Megatron's ``IndexedDatasetBuilder``. Importing Megatron for it would take longer
    than all the rest for a small text.
    """

    def __init__(self, prefix: Path, dtype: Any, held_out: bool) -> None:
        self.prefix, self.dtype, self.held_out = prefix, numpy.dtype(dtype), held_out
        self.documents = self.tokens = self.bytes = self.longest_document = 0
        self._lengths: list[Any] = [numpy.empty(0, numpy.int32)]
        _file(prefix, ".bin").touch()

    def append(self, tokens: Any, table: Any) -> None:
        """Append its documents of a part: tokens [N] and table [D, 3] (see ``parts.load``)."""
        ends = numpy.concatenate([[0], table[:, 0].cumsum()])
        mine = table[:, 2] == self.held_out
        with _file(self.prefix, ".bin").open("ab") as file:
            for first in range(0, len(table), DOCUMENTS):
                last = min(first + DOCUMENTS, len(table))
                chosen: Any = numpy.repeat(mine[first:last], table[first:last, 0])
                file.write(tokens[ends[first] : ends[last]][chosen])
        lengths, sizes = table[mine, 0], table[mine, 1]
        self._lengths.append(lengths.astype(numpy.int32))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.bytes += int(sizes.sum())
        self.longest_document = max(self.longest_document, int(lengths.max(initial=0)))

    def write_index(self) -> None:
        lengths = numpy.concatenate(self._lengths)
        ends = lengths.cumsum(dtype=numpy.int64) * self.dtype.itemsize
        with _file(self.prefix, ".idx").open("wb") as file:
            code = DTYPE_CODES[self.dtype.name]
            file.write(HEADER.pack(MARK, 1, code, self.documents, self.documents + 1))
            file.write(lengths)
            file.write(ends - lengths * numpy.int64(self.dtype.itemsize))
            file.write(numpy.arange(self.documents + 1, dtype=numpy.int64))


def fitting(table: Any, outputs: list[Output], max_tokens: int | None, max_bytes: int | None) -> int:
    """How many of a part's documents come before the first that exceeds a limit, all outputs together."""
    count = len(table)
    for column, limit, before in (
        (0, max_tokens, sum(output.tokens for output in outputs)),
        (1, max_bytes, sum(output.bytes for output in outputs)),
    ):
        if limit is not None:
            count = min(count, int((before + table[:, column].cumsum() <= limit).sum()))
    return count


def tokenizer_of(prefix: Path) -> Path:
    """The place of a tokenizer that was trained on the text."""
    return prefix.with_name(f"{prefix.name}.{TOKENIZER}")


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _files(prefix: Path) -> list[Path]:
    """The files of a prefix, in the order in which they go."""
    return [_file(prefix, suffix) for suffix in (".json", ".idx", ".bin")]


def check(options: Options, sources: Iterable[Path]) -> None:
    """Refuse a place where something would be lost. Touches nothing."""
    output, texts = options.output, {path.resolve() for path in sources}
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: is a folder; add the name that the files shall begin with")
    for prefix in options.prefixes:
        for path in (*_files(prefix), tokenizer_of(prefix)):
            if path.resolve() in texts:
                raise UserError(f"--output {output}: {path} is one of the sources; name another place")
        there = [path for path in _files(prefix) if path.exists()]
        if not there or (options.work / PUBLISHING).exists():
            continue  # what is there is half of the data that will be made now
        if not options.overwrite or record.read(prefix) is None:
            raise UserError(
                f"--output {output}: {there[0]} exists; remove it, or name another place (--overwrite"
                " replaces what has a record of prepare-data beside it)"
            )


def publish(options: Options, outputs: list[Output], records: list[record.Record]) -> None:
    """Give the files of the outputs their names, held-out data first, and write the records."""
    target, work = options.output, options.work
    for output in outputs:
        for file in _files(output.prefix)[1:]:
            sync(file)
    old = record.read(target)
    held_out = old is not None and bool(old.options.get("held_out"))
    (work / PUBLISHING).touch()
    for prefix in options.prefixes + [options.held_out_prefix] * held_out:
        for file in _files(prefix):
            file.unlink(missing_ok=True)
    tokenizer_of(target).unlink(missing_ok=True)
    if (work / TOKENIZER).exists():
        os.replace(work / TOKENIZER, tokenizer_of(target))
    for output, prefix, entries in reversed(list(zip(outputs, options.prefixes, records, strict=True))):
        for suffix in (".bin", ".idx"):
            os.replace(_file(output.prefix, suffix), _file(prefix, suffix))
        entries.write(prefix)
    sync(target.parent)
