"""Write the output files PREFIX.*: each pair of .bin and .idx appears complete or not at all.

Tokens (.bin) are published first, then the index (.idx), then the record; old data loses its record and index
first. So a crash at any point never leaves a readable mix of old and new data.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.record import Options, path_of
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync

# The header of an .idx file (megatron.core.datasets.indexed_dataset): magic bytes, version, dtype code, and
# the numbers of sequences and document ends. Lengths (int32), offsets (int64) and ends (int64) follow.
MARK, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
DOCUMENTS = 1 << 14  # copied at a time
PUBLISHING = "publishing"  # marker file in the folder of parts: old data may be gone from here on
SUFFIXES = (".json", ".idx", ".bin")  # in the order in which old files are removed


class Output:
    """One output prefix being written: the training documents, or the held-out ones.

    The bytes are those of Megatron's ``IndexedDatasetBuilder``. That is not used because, for a small text,
    importing Megatron would take longer than everything else.
    """

    def __init__(self, prefix: Path, dtype: Any, held_out: bool) -> None:
        self.prefix, self.dtype, self.held_out = prefix, numpy.dtype(dtype), held_out
        self.documents = self.tokens = self.bytes = self.longest_document = 0
        self._lengths: list[Any] = [numpy.empty(0, numpy.int32)]
        path_of(prefix, ".bin").touch()

    def append(self, tokens: Any, table: Any) -> None:
        """Append this output's documents from a part: tokens [N] and table [D, 3] (see ``parts.load``)."""
        ends = numpy.concatenate([[0], table[:, 0].cumsum()])
        mine = table[:, 2] == self.held_out
        with path_of(self.prefix, ".bin").open("ab") as file:
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
        places = (lengths.cumsum(dtype=numpy.int64) - lengths) * self.dtype.itemsize
        arrays: tuple[Any, ...] = (lengths, places, numpy.arange(self.documents + 1, dtype=numpy.int64))
        with path_of(self.prefix, ".idx").open("wb") as file:
            code = DTYPE_CODES[self.dtype.name]
            file.write(HEADER.pack(MARK, 1, code, self.documents, self.documents + 1))
            for array in arrays:
                file.write(array)


def fitting(table: Any, outputs: list[Output], options: Options) -> int:
    """How many of a part's documents come before the first that exceeds a limit over all outputs."""
    tokens, size = (sum(getattr(output, name) for output in outputs) for name in ("tokens", "bytes"))
    fits: Any = numpy.ones(len(table), bool)
    if options.max_tokens is not None:
        fits &= tokens + table[:, 0].cumsum() <= options.max_tokens
    if options.max_bytes is not None:
        fits &= size + table[:, 1].cumsum() <= options.max_bytes
    return int(fits.sum())


def check(options: Options, sources: Iterable[Path]) -> None:
    """Refuse an output location where existing files would be lost. Writes nothing."""
    output, texts = options.output, {path.resolve() for path in sources}
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: is a folder; add the name that the files shall begin with")
    for prefix in options.prefixes:
        files = [path_of(prefix, suffix) for suffix in SUFFIXES]
        for path in (*files, options.trained_tokenizer):
            if path.resolve() in texts:
                raise UserError(f"--output {output}: {path} is one of the sources; name another place")
        there = [path for path in files if path.exists()]
        if not there or (options.work / PUBLISHING).exists():
            continue  # left by an interrupted publish of the data that is being made now
        if not options.overwrite or record.read(prefix) is None:
            raise UserError(
                f"--output {output}: {there[0]} exists; remove it, or name another place (--overwrite"
                " replaces data that has a record of prepare-data)"
            )


def publish(options: Options, outputs: list[Output], records: list[record.Record]) -> None:
    """Rename the output files to their final names, held-out data first, and write the records."""
    for output in outputs:
        sync(path_of(output.prefix, ".bin"))
        sync(path_of(output.prefix, ".idx"))
    old, trained = record.read(options.output), options.work / options.trained_tokenizer.name
    (options.work / PUBLISHING).touch()
    for prefix in (options.output, options.held_out_prefix):
        if prefix in options.prefixes or (old and old.options.get("held_out")):
            for suffix in SUFFIXES:
                path_of(prefix, suffix).unlink(missing_ok=True)
    if not options.tokenizer or options.tokenizer.resolve() != options.trained_tokenizer.resolve():
        options.trained_tokenizer.unlink(missing_ok=True)
    if trained.exists():
        os.replace(trained, options.trained_tokenizer)
    for output, prefix, entries in reversed(list(zip(outputs, options.prefixes, records, strict=True))):
        for suffix in (".bin", ".idx"):
            os.replace(path_of(output.prefix, suffix), path_of(prefix, suffix))
        entries.write(prefix)
    sync(options.output.parent)
