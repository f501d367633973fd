"""Parts put together in order: the bytes of Megatron's ``IndexedDatasetBuilder``, a part at a time.

Importing Megatron for it would take longer than all the rest for a small text.
"""

import struct
from pathlib import Path
from typing import Any

import numpy

# The header of an .idx file (megatron.core.datasets.indexed_dataset): a mark, version, code of the dtype, and
# how many sequences and document ends there are. Lengths (int32), places (int64) and ends (int64) follow.
MARK, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
DOCUMENTS = 1 << 14  # that are copied at a time


class Output:
    """One prefix that is written: the documents of training, or those that are held out."""

    def __init__(self, prefix: Path, dtype: Any, held_out: bool) -> None:
        self.prefix, self.dtype, self.held_out = prefix, numpy.dtype(dtype), held_out
        self.documents = self.tokens = self.bytes = self.longest_document = 0
        self._lengths: list[Any] = [numpy.empty(0, numpy.int32)]
        self._open(".bin", "wb").close()

    def append(self, tokens: Any, table: Any) -> None:
        """Append its documents of a part: tokens [N] and table [D, 3] (see ``parts.load``)."""
        ends = numpy.concatenate([[0], table[:, 0].cumsum()])
        mine = table[:, 2] == self.held_out
        with self._open(".bin", "ab") as file:
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
        with self._open(".idx", "wb") as file:
            code = DTYPE_CODES[self.dtype.name]
            file.write(HEADER.pack(MARK, 1, code, self.documents, self.documents + 1))
            file.write(lengths)
            file.write(ends - lengths * numpy.int64(self.dtype.itemsize))
            file.write(numpy.arange(self.documents + 1, dtype=numpy.int64))

    def _open(self, suffix: str, mode: str) -> Any:
        return self.prefix.with_name(self.prefix.name + suffix).open(mode)


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
