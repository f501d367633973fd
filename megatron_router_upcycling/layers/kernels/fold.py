"""The mixture's fold (``routers.fold``, sum pooling) in one kernel forward and two backward.

A = K (W^1 + ... + W^m) / sqrt(d'). The sum over routers is never stored, and one kernel writes every
router's gradient.

Symbols: m routers, d' router width, n expert keys, D hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

MOST_KEYS = 128
ROWS = 16  # of the router's width in a step


def usable(query_weight: Tensor, expert_key: Tensor, dtype: torch.dtype) -> bool:
    return (
        kernels.usable(query_weight, expert_key)
        and dtype is torch.float32
        and expert_key.shape[0] <= MOST_KEYS
        and query_weight.is_contiguous()
        and expert_key.is_contiguous()
    )


def fold_sum(query_weight: Tensor, expert_key: Tensor) -> Tensor:
    """[m, d', D] and [n, d'] to float32 [n, D]."""
    return _Fold.apply(query_weight, expert_key)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_weight: Tensor, expert_key: Tensor) -> Tensor:
        m, width, D = query_weight.shape
        n = expert_key.shape[0]
        gate = query_weight.new_empty((n, D), dtype=torch.float32)
        sizes = m, width, D, n, 1 / math.sqrt(width), kernels.block_size(n)
        _fold[(kernels.blocks(D, 16),)](query_weight, expert_key, gate, *sizes, ROWS, 16)
        ctx.save_for_backward(query_weight, expert_key)
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query_weight, expert_key = ctx.saved_tensors
        m, width, D = query_weight.shape
        n = expert_key.shape[0]
        grad = grad.contiguous()
        grad_query, grad_key = torch.empty_like(query_weight), torch.empty_like(expert_key)
        sizes = m, width, D, n, 1 / math.sqrt(width)
        columns = kernels.block_size(D, 128)
        grid = (kernels.blocks(width, ROWS), kernels.blocks(D, columns))
        _fold_grad_query[grid](grad, expert_key, grad_query, *sizes, ROWS, columns)
        _fold_grad_key[(width,)](grad, query_weight, grad_key, *sizes, kernels.block_size(n), columns)
        return grad_query, grad_key


@triton.jit
def _fold(
    query, key, gate, m, width, D, n, scale, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.arange(0, N)
    total = tl.zeros((N, COLUMNS), tl.float32)
    for start in range(0, width, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < width) & (column[None, :] < D)
        summed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for router in range(0, m):
            place = query + (router * width + row[:, None]).to(tl.int64) * D + column[None, :]
            summed += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        of_key = expert[:, None] * width + row[None, :]
        k = tl.load(key + of_key, mask=(expert[:, None] < n) & (row[None, :] < width), other=0.0)
        total += tl.dot(k.to(tl.float32), summed, input_precision="ieee")
    place = gate + expert[:, None] * D + column[None, :]
    tl.store(place, total * scale, mask=(expert[:, None] < n) & (column[None, :] < D))


@triton.jit
def _fold_grad_query(
    grad, key, grad_query, m, width, D, n, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for expert in range(0, n):
        k = tl.load(key + expert * width + row, mask=row < width, other=0.0).to(tl.float32)
        above = tl.load(grad + expert * D + column, mask=column < D, other=0.0)
        total += k[:, None] * above[None, :]
    value = (total * scale).to(grad_query.dtype.element_ty)
    for router in range(0, m):
        place = grad_query + (router * width + row[:, None]).to(tl.int64) * D + column[None, :]
        tl.store(place, value, mask=(row[:, None] < width) & (column[None, :] < D))


@triton.jit
def _fold_grad_key(
    grad, query, grad_key, m, width, D, n, scale, N: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    expert = tl.arange(0, N)
    total = tl.zeros((N, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        summed = tl.zeros((COLUMNS,), tl.float32)
        for router in range(0, m):
            place = query + (router * width + row).to(tl.int64) * D + column
            summed += tl.load(place, mask=column < D, other=0.0).to(tl.float32)
        of_grad = expert[:, None] * D + column[None, :]
        above = tl.load(grad + of_grad, mask=(expert[:, None] < n) & (column[None, :] < D), other=0.0)
        total += above * summed[None, :]
    value = tl.sum(total, 1) * scale
    tl.store(grad_key + expert * width + row, value.to(grad_key.dtype.element_ty), mask=expert < n)
