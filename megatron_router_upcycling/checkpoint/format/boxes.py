"""Boxes that make up a tensor, and where they fail to cover each element exactly once."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how large it is on each axis."""

    offsets: Shape
    sizes: Shape

    @property
    def ends(self) -> Shape:
        return tuple(map(int.__add__, self.offsets, self.sizes))

    def overlap(self, other: "Box") -> "Box | None":
        """The part that both boxes share; None if there is none."""
        low = tuple(map(max, self.offsets, other.offsets))
        high = tuple(map(min, self.ends, other.ends))
        if any(map(int.__ge__, low, high)):
            return None
        return Box(low, tuple(map(int.__sub__, high, low)))

    def along(self, axis: int, offset: int, size: int) -> "Box":
        """The box with another extent along ``axis``."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[axis], sizes[axis] = offset, size
        return Box(tuple(offsets), tuple(sizes))

    def within(self, offsets: Shape) -> tuple[slice, ...]:
        """The box as slices of a tensor that begins at ``offsets``."""
        starts = tuple(map(int.__sub__, self.offsets, offsets))
        return tuple(map(slice, starts, map(int.__add__, starts, self.sizes)))


def blocks(box: Box, most: int) -> Iterator[Box]:
    """Cut a box into blocks of at most ``most`` elements, in the order in which elements lie in memory."""
    if math.prod(box.sizes) <= most:
        yield box
        return
    axis = next(axis for axis, size in enumerate(box.sizes) if size > 1)
    step = max(1, most // math.prod(box.sizes[axis + 1 :]))
    for start in range(box.offsets[axis], box.ends[axis], step):
        yield from blocks(box.along(axis, start, min(step, box.ends[axis] - start)), most)


def is_inside(shape: Shape, box: Box) -> bool:
    """Whether ``box`` has as many axes as ``shape`` and lies inside it."""
    return (
        len(shape) == len(box.offsets) == len(box.sizes)
        and min((*box.offsets, *box.sizes), default=0) >= 0
        and all(map(int.__le__, box.ends, shape))
    )


def faults(shape: Shape, boxes: Sequence[Box], prefix: Box = Box((), ())) -> Iterator[tuple[int, Box]]:
    """The parts of a tensor that are in no box, or in several: (number of boxes, part).

    ``boxes`` lie inside ``shape``. ``prefix``, for the recursion: the slab along the first axes to check.
    """
    axis = len(prefix.offsets)
    if not math.prod(shape):
        return
    if axis == len(shape) or not boxes:
        if len(boxes) != 1:
            rest = (0,) * (len(shape) - axis)
            yield len(boxes), Box(prefix.offsets + rest, prefix.sizes + shape[axis:])
        return
    places = {place for box in boxes for place in (box.offsets[axis], box.ends[axis])}
    cuts = sorted({0, shape[axis], *places})
    slabs: list[list[Box]] = [[] for _ in cuts[1:]]
    for box in boxes:
        for slab in slabs[bisect_left(cuts, box.offsets[axis]) : bisect_left(cuts, box.ends[axis])]:
            slab.append(box)
    for low, high, within in zip(cuts, cuts[1:], slabs, strict=False):
        yield from faults(shape, within, Box((*prefix.offsets, low), (*prefix.sizes, high - low)))
