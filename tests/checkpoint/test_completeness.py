"""Nothing is made twice, in part, or unasked; nothing is taken over that is not what it goes by."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk, StoredTensor
from megatron_router_upcycling.checkpoint.publish.completeness import (
    check_whole,
    content_digests,
    examine_all,
)
from megatron_router_upcycling.errors import UserError

BLOB = Blob("a", 0, 1)
WHOLE = StoredTensor((2, 4), torch.float32, (Chunk((0, 0), (2, 2), BLOB), Chunk((0, 2), (2, 2), BLOB)))
TARGETS = {"w": ((2, 4), torch.float32), "state": None}


def test_what_was_planned_and_made_passes() -> None:
    check_whole({"w": WHOLE}, {"state": BLOB}, TARGETS)


@pytest.mark.parametrize(
    ("tensors", "objects", "message"),
    [
        ({}, {"state": BLOB}, "w was not made"),
        ({"w": WHOLE}, {}, "state was not made"),
        ({"w": WHOLE, "v": WHOLE}, {"state": BLOB}, "v was not planned"),
        ({"w": replace(WHOLE, dtype=torch.float16)}, {"state": BLOB}, r"w is torch.float16 \[2, 4\]"),
        ({"w": replace(WHOLE, chunks=WHOLE.chunks[:1])}, {"state": BLOB}, "w has gaps or overlapping"),
        ({"w": replace(WHOLE, chunks=WHOLE.chunks * 2)}, {"state": BLOB}, "w has gaps or overlapping"),
        (
            {"w": replace(WHOLE, chunks=(WHOLE.chunks[0], Chunk((0, 3), (2, 2), BLOB)))},
            {"state": BLOB},
            "w has a chunk outside it",
        ),
    ],
)
def test_what_was_not_is_an_error(
    tensors: dict[str, StoredTensor], objects: dict[str, Blob], message: str
) -> None:
    with pytest.raises(UserError, match=message):
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
