"""Rows of a checkpoint's tensors, whatever chunks they are stored in.

Megatron stores a tensor as the boxes that its ranks held: a chunk a layer, an expert, a tensor-parallel
rank, for rows or for columns. Here one asks for rows of one layer's (or expert's) matrix and gets them.
"""

import io
import itertools
import math
from collections import defaultdict

import torch

from megatron_router_upcycling.checkpoint.format.files import read_exactly
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk
from megatron_router_upcycling.checkpoint.format.torch_save_file import Values
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint

Index = tuple[int, ...]


class RowReader:
    """Reads rows of ``checkpoint``'s tensors; close it, or use it as a context."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, io.FileIO] = {}
        self._chunks: dict[tuple[str, int], dict[Index, list[Chunk]]] = {}
        self._values: dict[tuple[Blob, Index], Values | None] = {}

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, key: str, index: Index, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with rows ``start`` .. ``stop`` of ``tensor[index]``.

        Args:
            index: a place on the axes that the tensor is stacked on, () for none.
            out: [stop - start, ...], contiguous, of the tensor's dtype.

        Raises:
            UserError: a damaged data file.
        """
        axis = len(index)
        for chunk in self._at(key, axis)[index]:
            first, last = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            box = tuple(map(slice, chunk.offsets[axis + 1 :], _ends(chunk)[axis + 1 :]))
            target = out[(slice(low - start, high - start), *box)]
            inside = tuple(place - offset for place, offset in zip(index, chunk.offsets, strict=False))
            self._read_box(chunk, inside, low - first, high - first, target)

    def _at(self, key: str, axis: int) -> dict[Index, list[Chunk]]:
        """The chunks of every place on the stacked axes."""
        if (key, axis) not in self._chunks:
            found: dict[Index, list[Chunk]] = defaultdict(list)
            for chunk in self.checkpoint.tensors[key].chunks:
                places = map(range, chunk.offsets[:axis], _ends(chunk)[:axis])
                for index in itertools.product(*places):
                    found[index].append(chunk)
            self._chunks[key, axis] = found
        return self._chunks[key, axis]

    def _read_box(self, chunk: Chunk, inside: Index, low: int, high: int, target: torch.Tensor) -> None:
        """Rows ``low`` .. ``high`` of ``chunk[inside]``, all its columns."""
        axis = len(inside)
        values = self._find(chunk, target.dtype)
        if values is None:
            target.copy_(self.checkpoint.read_chunk(chunk, target.dtype, bytearray())[inside][low:high])
            return
        row = math.prod(chunk.sizes[axis + 1 :]) * target.dtype.itemsize
        place = 0  # of the matrix among the chunk's
        for position, size in zip(inside, chunk.sizes, strict=False):
            place = place * size + position
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        file = self._open(chunk.blob.file)
        file.seek(values.offset + (place * chunk.sizes[axis] + low) * row)
        read_exactly(file, memoryview(rows.view(torch.uint8).flatten().numpy()))
        if rows is not target:
            target.copy_(rows)

    def _find(self, chunk: Chunk, dtype: torch.dtype) -> Values | None:
        key = chunk.blob, chunk.sizes
        if key not in self._values:
            self._values[key] = self.checkpoint.find_values(chunk, dtype)
        return self._values[key]

    def _open(self, name: str) -> io.FileIO:
        if name not in self._files:
            path = self.checkpoint.iteration_dir / name
            self._files[name] = io.FileIO(path)
        return self._files[name]


def _ends(chunk: Chunk) -> Index:
    return tuple(offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
