"""Nothing is made twice, in part, or unasked; nothing is taken over that is not what it goes by, or NaN."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk, StoredTensor
from megatron_router_upcycling.checkpoint.publish.checks import (
    all_finite,
    check_whole,
    content_digests,
    examine_all,
)
from megatron_router_upcycling.errors import UserError

BLOB = Blob("a", 0, 1)
WHOLE = StoredTensor((2, 4), torch.float32, (Chunk((0, 0), (2, 2), BLOB), Chunk((0, 2), (2, 2), BLOB)))
TARGETS = {"w": ((2, 4), torch.float32), "state": None}


def test_only_what_was_planned_passes() -> None:
    check_whole({"w": WHOLE}, {"state": BLOB}, TARGETS)
    outside = replace(WHOLE, chunks=(WHOLE.chunks[0], Chunk((0, 3), (2, 2), BLOB)))
    for wrong, tensors, objects in (
        ("w", {}, {"state": BLOB}),
        ("state", {"w": WHOLE}, {}),
        ("v", {"w": WHOLE, "v": WHOLE}, {"state": BLOB}),
        ("w", {"w": replace(WHOLE, dtype=torch.float16)}, {"state": BLOB}),
        ("w", {"w": replace(WHOLE, chunks=WHOLE.chunks[:1])}, {"state": BLOB}),
        ("w", {"w": replace(WHOLE, chunks=WHOLE.chunks * 2)}, {"state": BLOB}),
        ("w", {"w": outside}, {"state": BLOB}),
    ):
        with pytest.raises(UserError, match=f"OUT: {wrong} is not what was planned"):
            check_whole(tensors, objects, TARGETS)


def archive(values: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def test_chunks_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    content = archive(torch.ones(2, 2))
    (tmp_path / "a").write_bytes(content)
    blob = Blob("a", 0, len(content))

    def examine(dtype: torch.dtype, sizes: tuple[int, ...], blob: Blob = blob) -> dict[Blob, bytes]:
        stored = StoredTensor(sizes, dtype, (Chunk((0,) * len(sizes), sizes, blob),))
        return examine_all(tmp_path, {"w": stored}, {})

    first = content_digests(examine(torch.float32, (2, 2)))
    for dtype, sizes in ((torch.int32, (2, 2)), (torch.float32, (4,))):
        with pytest.raises(UserError, match="damaged, should hold w"):
            examine(dtype, sizes)
    with pytest.raises(UserError, match="does not end as"):
        examine(torch.float32, (2, 2), replace(blob, length=blob.length - 1))

    (tmp_path / "a").write_bytes(archive(torch.ones(2, 2)))
    assert content_digests(examine(torch.float32, (2, 2))) == first
    (tmp_path / "a").write_bytes(archive(torch.full((2, 2), 2.0)))
    assert content_digests(examine(torch.float32, (2, 2))) != first


# Bits of positive infinity.
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80_0000}
WORDS = {2: np.uint16, 4: np.uint32}


@pytest.mark.parametrize("dtype", INFINITY, ids=str)
@given(data=st.data())
def test_as_torch_says(dtype: torch.dtype, data: st.DataObject) -> None:
    bits = 8 * dtype.itemsize
    edge = INFINITY[dtype]
    near = st.integers(-2, 2).flatmap(lambda d: st.sampled_from([edge + d, edge + d + (1 << (bits - 1))]))
    word = st.one_of(st.integers(0, (1 << bits) - 1), near)
    words = np.array(data.draw(st.lists(word, min_size=1, max_size=40)), WORDS[dtype.itemsize])
    values = torch.from_numpy(words).view(dtype)
    assert all_finite(values) == bool(values.isfinite().all())


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.full((3,), -1, dtype=torch.int16)) and all_finite(torch.empty(0))
