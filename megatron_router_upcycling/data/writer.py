"""Parts put together in order: the bytes of Megatron's ``IndexedDatasetBuilder``, a part at a time.

Importing Megatron for it would take longer than all the rest for a small text.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from megatron_router_upcycling.data.agreement import HEADER, MARK

DTYPE_CODES = {"uint16": 8, "int32": 4}  # megatron.core.datasets.indexed_dataset.DType
DOCUMENTS = 1 << 14  # that are copied at a time


@dataclass
class Output:
    """One prefix that is written."""

    prefix: Path
    tokens: int = 0
    bytes: int = 0
    lengths: list[Any] = field(default_factory=list)  # int32 [D] of each batch of documents

    @property
    def documents(self) -> int:
        return sum(map(len, self.lengths))

    @property
    def longest_document(self) -> int:
        return max((int(lengths.max()) for lengths in self.lengths), default=0)

    def open(self, suffix: str, mode: str) -> Any:
        return self.prefix.with_name(self.prefix.name + suffix).open(mode)


class Writer:
    """Writes files ``prefix``.bin and .idx, and beside them those of what is held out.

    The document that would exceed ``max_tokens`` or ``max_bytes``, held-out ones counted in, is the first
    that is left out.
    """

    def __init__(
        self, prefixes: tuple[Path, ...], dtype: Any, max_tokens: int | None, max_bytes: int | None
    ) -> None:
        self.outputs = [Output(prefix) for prefix in prefixes]
        self.dtype, self._limits, self.full = dtype, (max_tokens, max_bytes), False
        for output in self.outputs:
            output.open(".bin", "wb").close()

    def append(self, tokens: Any, table: Any) -> None:
        """Append a part: its tokens [N] and its table [D, 3] (see ``parts.load``)."""
        fitting = 0 if self.full else self._fitting(table)
        self.full |= fitting < len(table)
        table = table[:fitting]
        ends = numpy.concatenate([[0], table[:, 0].cumsum()])
        for first in range(0, len(table), DOCUMENTS):
            rows = table[first : first + DOCUMENTS]
            batch = tokens[ends[first] : ends[first + len(rows)]]
            sides: Any = numpy.repeat(rows[:, 2], rows[:, 0])
            for side, output in enumerate(self.outputs):
                mine = rows[rows[:, 2] == side]
                if len(mine):
                    with output.open(".bin", "ab") as file:
                        file.write(batch if len(mine) == len(rows) else batch[sides == side])
                    output.lengths.append(mine[:, 0].astype(numpy.int32))
                    output.tokens += int(mine[:, 0].sum())
                    output.bytes += int(mine[:, 1].sum())

    def _fitting(self, table: Any) -> int:
        """How many of the documents come before the first that exceeds a limit."""
        so_far = (sum(output.tokens for output in self.outputs), sum(output.bytes for output in self.outputs))
        return min(
            int((before + table[:, column].cumsum() <= limit).sum()) if limit is not None else len(table)
            for column, (before, limit) in enumerate(zip(so_far, self._limits, strict=True))
        )

    def close(self) -> None:
        """Write the indices."""
        for output in self.outputs:
            count = output.documents
            lengths = numpy.concatenate([numpy.empty(0, numpy.int32), *output.lengths])
            size, name = numpy.dtype(self.dtype).itemsize, numpy.dtype(self.dtype).name
            ends = lengths.cumsum(dtype=numpy.int64) * size
            with output.open(".idx", "wb") as file:
                file.write(HEADER.pack(MARK, 1, DTYPE_CODES[name], count, count + 1))
                file.write(lengths)
                file.write(ends - lengths * numpy.int64(size))
                file.write(numpy.arange(count + 1, dtype=numpy.int64))
