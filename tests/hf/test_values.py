"""Values on their way: blocks, casts, safetensors files, and what rounding a gate changes."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import safetensors_file
from megatron_router_upcycling.hf.safetensors_file import (
    Entry,
    SafetensorsFile,
    as_bytes,
    blocks,
    cast,
    format_header,
    sample_digest,
)
from megatron_router_upcycling.hf.shard import Rounding
from megatron_router_upcycling.routers.config import RouterConfig


@given(rows=st.integers(1, 300), row_bytes=st.integers(1, 1 << 26))
def test_blocks_cover_every_row_once(rows: int, row_bytes: int) -> None:
    found = list(blocks(rows, row_bytes))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == rows


def test_cast_refuses_what_a_dtype_cannot_hold() -> None:
    values = torch.tensor([1.0, -70000.0])
    assert torch.equal(cast(values, torch.bfloat16, "x"), values.bfloat16())
    with pytest.raises(UserError, match="x: holds values too large for float16"):
        cast(values, torch.float16, "x")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(UserError, match="x: holds NaN or infinite values"):
            cast(torch.tensor([1.0, bad]), torch.float32, "x")


def test_the_digest_of_a_file_sees_its_values(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"x": torch.zeros(1000)}, path)
    before = sample_digest(path)
    save_file({"x": torch.ones(1000)}, path)
    assert sample_digest(path) != before
    save_file({"x": torch.zeros(1000)}, path)
    assert sample_digest(path) == before


@pytest.mark.parametrize("padding", range(4))
def test_rows_are_those_of_the_file_however_often_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    """Also where the values do not begin at a multiple of their size, as files of others may have it."""
    monkeypatch.setattr(safetensors_file, "MAPPED_BYTES", 8)
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [7, 3], "data_offsets": [0, 42]}}).encode()
    header += b" " * padding
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + bytes(as_bytes(values)))
    file = SafetensorsFile(tmp_path / "file")
    assert file.entries == {"x": Entry("BF16", (7, 3))}
    for start in range(7):
        assert torch.equal(file.rows("x", start, start + 1), values[start : start + 1])
    assert torch.equal(file.rows("x", 0, 7), values)


def test_a_header_is_what_the_library_reads(tmp_path: Path) -> None:
    values = {"b": torch.ones(2, 3), "a": torch.zeros(5)}
    header = format_header([(name, tuple(value.shape)) for name, value in values.items()], torch.float32)
    assert len(header) % 8 == 0
    (tmp_path / "file").write_bytes(header + b"".join(as_bytes(value) for value in values.values()))
    found = load_file(tmp_path / "file")
    assert found.keys() == values.keys() and all(found[name].equal(values[name]) for name in values)


def test_rounding_counts_choices_as_loops_do() -> None:
    router = RouterConfig(router="linear", num_experts=4, top_k=2)
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(4, 8, generator=generator) * 1e-3 + torch.randn(8, generator=generator)  # close rivals
    norm = torch.rand(8, generator=generator) + 0.5
    rounding = Rounding()
    rounding.add({"weight": gate}, norm, router, 0, torch.bfloat16)

    tokens = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)) * norm
    changed = 0
    for token in tokens.bfloat16().double().numpy():
        exact, rounded = (
            set(np.argsort(weights.double().numpy() @ token)[-2:]) for weights in (gate, gate.bfloat16())
        )
        changed += len(exact - rounded)
    assert rounding.choices == 2048 and changed > 100
    assert abs(rounding.by_rounding - changed) <= 4  # ties of a rounded gate
    assert rounding.by_arithmetic > rounding.by_rounding / 2
    assert (
        f"of 2048 choices of an expert for random tokens {rounding.by_rounding} are others"
        in rounding.describe("bfloat16")
    )
