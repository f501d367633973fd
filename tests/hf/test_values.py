"""Values on their way: blocks, casts, safetensors files, and what rounding a gate changes."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import exporter
from megatron_router_upcycling.hf.safetensors_file import (
    as_bytes,
    blocks,
    cast,
    read_header,
    sample_digest,
)
from megatron_router_upcycling.routers.config import RouterConfig


@given(rows=st.integers(1, 300), row_bytes=st.integers(1, 1 << 26))
def test_blocks_cover_every_row_once(rows: int, row_bytes: int) -> None:
    found = list(blocks((rows, row_bytes), 1))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == rows
    assert all((stop - start) * row_bytes <= 8 << 20 or stop - start == 1 for start, stop in found)


def test_cast_refuses_what_a_dtype_cannot_hold() -> None:
    values = torch.tensor([1.0, -70000.0])
    assert torch.equal(cast(values, torch.bfloat16, "x"), values.bfloat16())
    with pytest.raises(UserError, match="x: holds values too large for float16"):
        cast(values, torch.float16, "x")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(UserError, match="x: holds NaN or infinite values"):
            cast(torch.tensor([1.0, bad]), torch.float32, "x")


def test_the_digest_of_a_file_sees_its_values(tmp_path: Path) -> None:
    digests = []
    for value in (0.0, 1.0, 0.0):
        save_file({"x": torch.full((1000,), value)}, tmp_path / "file")
        digests.append(sample_digest(tmp_path / "file"))
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("padding", range(4))
def test_rows_are_those_of_the_file(tmp_path: Path, padding: int) -> None:
    """Also where the values do not begin at a multiple of their size, as files of others may have it."""
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, second = ({"dtype": "BF16", "shape": [n, 3], "data_offsets": at} for n, at in SPLIT)
    header = json.dumps({"w": first, "x": second}).encode() + b" " * padding
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + bytes(as_bytes(values)))
    stored = read_header(tmp_path / "file")["x"]
    assert (stored.dtype, stored.shape) == ("BF16", (7, 3))
    for start, stop in ((0, 7), *((row, row + 1) for row in range(7))):
        assert torch.equal(stored.rows(start, stop), values[2 + start : 2 + stop])


SPLIT = ((2, [0, 12]), (7, [12, 54]))


def test_rounding_counts_choices_as_loops_do() -> None:
    router = RouterConfig(router="linear", num_experts=4, top_k=2)
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(4, 8, generator=generator) * 1e-3 + torch.randn(8, generator=generator)  # close rivals
    norm = torch.rand(8, generator=generator) + 0.5
    found = exporter.changed_choices({"weight": gate}, norm, router, 0, torch.bfloat16)

    tokens = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)) * norm
    changed = 0
    for token in tokens.bfloat16().double().numpy():
        exact, rounded = (
            set(np.argsort(weights.double().numpy() @ token)[-2:]) for weights in (gate, gate.bfloat16())
        )
        changed += len(exact - rounded)
    assert found["choices"] == 2048 and changed > 100
    assert abs(found["by_rounding"] - changed) <= 4  # ties of a rounded gate
    assert found["by_arithmetic"] > found["by_rounding"] / 2
