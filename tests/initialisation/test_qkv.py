"""Megatron's fused layouts: bitwise round trips, and the layout itself written out as loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.initialisation.qkv import (
    merge_gated_fc1,
    merge_qkv,
    split_gated_fc1,
    split_qkv,
)


@st.composite
def fused(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, int]:
    """A fused tensor of distinct values, with (number of heads, groups, head size, dim)."""
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 4))
    head_dim = draw(st.integers(1, 5))
    leading = draw(st.lists(st.integers(1, 3), max_size=2))
    rows = (heads + 2 * groups) * head_dim
    bias = draw(st.booleans())
    shape = [*leading, rows] if bias else [*leading, rows, draw(st.integers(1, 4))]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    values = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0))
    return values.reshape(shape).to(dtype), heads, groups, head_dim, -1 if bias else -2


@given(fused())
def test_split_then_merge_is_the_identity(case: tuple[torch.Tensor, int, int, int, int]) -> None:
    qkv, heads, groups, _, dim = case
    merged = merge_qkv(*split_qkv(qkv, heads, groups, dim), heads, groups, dim)
    assert merged.dtype == qkv.dtype and torch.equal(merged, qkv)


@given(fused())
def test_split_takes_the_rows_that_megatron_put_there(case: tuple[torch.Tensor, int, int, int, int]) -> None:
    qkv, heads, groups, head_dim, dim = case
    query, key, value = split_qkv(qkv, heads, groups, dim)
    expected: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    row = 0
    for _ in range(groups):
        for part, count in (("query", heads // groups), ("key", 1), ("value", 1)):
            for _ in range(count * head_dim):
                expected[part].append(qkv.select(dim, row))
                row += 1
    for name, found in (("query", query), ("key", key), ("value", value)):
        assert torch.equal(found, torch.stack(expected[name], dim=dim))


def test_a_negative_and_a_positive_dim_mean_the_same() -> None:
    qkv = torch.arange(3 * 8 * 5).reshape(3, 8, 5)
    for negative, positive in zip(split_qkv(qkv, 4, 2, dim=-2), split_qkv(qkv, 4, 2, dim=1), strict=True):
        assert torch.equal(negative, positive)


@given(st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_gated_fc1_round_trip(ffn: int, layers: int, bias: bool) -> None:
    shape, dim = ((layers, 2 * ffn), -1) if bias else ((layers, 2 * ffn, 4), -2)
    fc1 = torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).reshape(shape)
    gate, up = split_gated_fc1(fc1, dim)
    assert torch.equal(gate, fc1.narrow(dim, 0, ffn)) and torch.equal(up, fc1.narrow(dim, ffn, ffn))
    assert torch.equal(merge_gated_fc1(gate, up, dim), fc1)


@pytest.mark.parametrize("rows, heads, groups", [(10, 4, 2), (24, 4, 3), (24, 4, 0)])
def test_rows_that_are_not_whole_heads_are_refused(rows: int, heads: int, groups: int) -> None:
    with pytest.raises(ValueError):
        split_qkv(torch.zeros(rows, 2), heads, groups)


def test_query_rows_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query rows"):
        merge_qkv(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(2, 2), 2, 2)


def test_an_odd_gated_fc1_is_refused() -> None:
    with pytest.raises(ValueError, match="7 rows"):
        split_gated_fc1(torch.zeros(7, 2))
