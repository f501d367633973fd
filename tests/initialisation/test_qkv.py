"""Megatron's fused layout: bitwise round trips, and the layout itself written out as loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.initialisation.qkv import split_qkv
from tests.reference.fused import merge_qkv


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


@pytest.mark.parametrize("rows, heads, groups", [(10, 4, 2), (24, 4, 3), (24, 4, 0)])
def test_rows_that_are_not_whole_heads_are_refused(rows: int, heads: int, groups: int) -> None:
    with pytest.raises(ValueError):
        split_qkv(torch.zeros(rows, 2), heads, groups)
