"""What a tensor must hold: its shape, its dtype, and where the values of each box of it come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.verify.sources import ComputedTensor, Source, StoredTensor, slices


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that must equal the box of ``source`` which begins at ``start``.

    ``axes`` gives, for each axis of the source, the tensor's axis that runs along it; None stays at
    ``start``. Axes that none runs along have size 1 in ``box``.
    """

    box: Box
    source: Source
    name: str  # of the source, the same for the same source
    start: Shape
    axes: tuple[int | None, ...]

    def source_box(self, part: Box) -> Box:
        """The source's box for a part of ``box``."""
        offsets, sizes = [], []
        for start, axis in zip(self.start, self.axes, strict=True):
            offsets.append(start if axis is None else start + part.offsets[axis] - self.box.offsets[axis])
            sizes.append(1 if axis is None else part.sizes[axis])
        return Box(tuple(offsets), tuple(sizes))


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor's shape, dtype and values; ``check`` is the finding that a difference counts as."""

    check: str
    shape: Shape
    dtype: torch.dtype
    pieces: Callable[[Box], Iterator[Piece]]  # those that make up a box

    def of_layer(self, layer: int) -> "ExpectedTensor":
        """``tensor[layer]`` of one stacked over layers."""

        def pieces(box: Box) -> Iterator[Piece]:
            for piece in self.pieces(Box((layer, *box.offsets), (1, *box.sizes))):
                inner = Box(piece.box.offsets[1:], piece.box.sizes[1:])
                axes = tuple(axis - 1 if axis else None for axis in piece.axes)
                yield replace(piece, box=inner, axes=axes)

        return ExpectedTensor(self.check, self.shape[1:], self.dtype, pieces)


def equal_to(source: Source, name: str, check: str, shape: Shape, dtype: torch.dtype) -> ExpectedTensor:
    """A tensor that holds what ``source`` holds, box for box."""

    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, source, name, box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor(check, shape, dtype, pieces)


def copy_of(stored: StoredTensor, check: str) -> ExpectedTensor:
    return equal_to(stored, stored.key, check, stored.shape, stored.dtype)


def computed(
    compute: Callable[..., torch.Tensor], check: str, shape: Shape, dtype: torch.dtype, num_axes: int = 1
) -> ExpectedTensor:
    """A tensor of which ``compute`` gives the values at one index of each of the first ``num_axes`` axes."""
    source = ComputedTensor(
        dtype,
        lambda box: slices(shape, num_axes, box),
        lambda box: compute(*box.offsets[:num_axes]),
    )
    return equal_to(source, "computed", check, shape, dtype)
