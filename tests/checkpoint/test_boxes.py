"""Elements in no box or in several, against counting them one by one."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.checkpoint.format.boxes import Box, faults, is_inside


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A grid of boxes, some of them left out, doubled or moved."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    boxes = []
    for cell in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        box = Box(tuple(low for low, _ in cell), tuple(high - low for low, high in cell))
        for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
            moved = tuple(place + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1])) for place in box.offsets)
            boxes.append(Box(moved, box.sizes))
    return shape, boxes


def region(box: Box) -> tuple[slice, ...]:
    return tuple(map(slice, box.offsets, box.ends))


@given(shapes_and_boxes())
def test_faults_are_what_counting_finds(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    for box in boxes:
        expected = all(o >= 0 and o + s <= n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True))
        assert is_inside(shape, box) == expected
    boxes = [box for box in boxes if is_inside(shape, box)]
    count = np.zeros(shape, int)
    for box in boxes:
        count[region(box)] += 1
    found = np.ones(shape, int)
    for times, box in faults(shape, boxes):
        assert (found[region(box)] == 1).all(), "said twice"
        found[region(box)] = times
    assert (found == count).all()


def test_edges() -> None:
    assert not is_inside((2, 2), Box((0,), (2,))) and not is_inside((2,), Box((0,), (-1,)))
    assert list(faults((0, 3), [])) == []
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (5, 3))
    assert a.overlap(b) == b.overlap(a) == Box((3, 2), (1, 1)) and a.overlap(Box((4, 2), (1, 1))) is None
