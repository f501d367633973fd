"""Logits of bfloat16 tokens to float32's precision, on tensor cores and without a float32 copy of the tokens.

A bfloat16 token is exact in float32, and a float32 weight is the sum of three bfloat16 numbers (24 bits of
mantissa are three times 8). So x . a = x . a1 + x . a2 + x . a3 with bfloat16 factors and float32 sums, which
is what tensor cores do.

Symbols: T tokens, D hidden size, n rows of the gate.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

MOST_ROWS = 128  # of a gate that one block of the kernels holds


def usable(tokens: Tensor, gate: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``gate_logits`` takes these: bfloat16 tokens and float32 logits, on a GPU."""
    return (
        kernels.usable(tokens, gate)
        and tokens.dtype is torch.bfloat16
        and gate.dtype is torch.float32
        and dtype is torch.float32
        and gate.shape[0] <= MOST_ROWS
        and tokens.shape[0] > 0
    )


def gate_logits(tokens: Tensor, gate: Tensor) -> Tensor:
    """tokens bfloat16 [T, D] times gate float32 [n, D]: float32 [T, n]."""
    return _GateLogits.apply(tokens, gate)


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gate: Tensor) -> Tensor:
        tokens, gate = tokens.contiguous(), gate.contiguous()
        ctx.save_for_backward(tokens, gate)
        T, D = tokens.shape
        n = gate.shape[0]
        logits = gate.new_empty(T, n)
        constants = kernels.block_size(n), 64, 64, kernels.INTERPRETED
        _gate_logits[(kernels.blocks(T, 64),)](tokens, gate, logits, T, D, n, *constants)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        tokens, gate = ctx.saved_tensors
        grad = grad.contiguous()
        T, D = tokens.shape
        n = gate.shape[0]
        grad_tokens = torch.empty_like(tokens)
        columns = kernels.block_size(D, 128)
        grid = (kernels.blocks(T, 32), kernels.blocks(D, columns))
        _gate_grad_tokens[grid](grad, gate, grad_tokens, T, D, n, 32, columns)
        # Tokens are summed in parts, and the parts in a fixed order: every run gives the same result.
        parts = min(32, kernels.blocks(T, 64))
        partial = gate.new_empty(parts, n, D)
        columns = kernels.block_size(D, 64)
        sizes = T, D, n, kernels.blocks(T, 64 * parts)
        constants = kernels.block_size(n), 64, columns, kernels.INTERPRETED
        _gate_grad_weight[(kernels.blocks(D, columns), parts)](grad, tokens, partial, *sizes, *constants)
        return grad_tokens, partial.sum(0)


@triton.jit
def _split(value):
    """Three bfloat16 numbers whose sum is the float32 ``value``."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    """A product of bfloat16 blocks with float32 sums; Triton's interpreter cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _gate_logits(
    tokens, gate, logits, T, D, n, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, N)
    total = tl.zeros((ROWS, N), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        of_x = token[:, None].to(tl.int64) * D + column[None, :]
        x = tl.load(tokens + of_x, mask=(token[:, None] < T) & (column[None, :] < D), other=0.0)
        of_a = expert[None, :] * D + column[:, None]
        a = tl.load(gate + of_a, mask=(expert[None, :] < n) & (column[:, None] < D), other=0.0)
        high, middle, low = _split(a)
        total += _product(x, low, UPCAST)
        total += _product(x, middle, UPCAST)
        total += _product(x, high, UPCAST)
    place = logits + token[:, None] * n + expert[None, :]
    tl.store(place, total, mask=(token[:, None] < T) & (expert[None, :] < n))


@triton.jit
def _gate_grad_tokens(grad, gate, grad_tokens, T, D, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for expert in range(0, n):
        above = tl.load(grad + token * n + expert, mask=token < T, other=0.0)
        a = tl.load(gate + expert * D + column, mask=column < D, other=0.0)
        total += above[:, None] * a[None, :]
    place = grad_tokens + token[:, None].to(tl.int64) * D + column[None, :]
    inside = (token[:, None] < T) & (column[None, :] < D)
    tl.store(place, total.to(grad_tokens.dtype.element_ty), mask=inside)


@triton.jit
def _gate_grad_weight(
    grad, tokens, partial, T, D, n, steps, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    expert = tl.arange(0, N)
    total = tl.zeros((N, COLUMNS), tl.float32)
    for step in range(0, steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        of_grad = token[None, :] * n + expert[:, None]
        above = tl.load(grad + of_grad, mask=(token[None, :] < T) & (expert[:, None] < n), other=0.0)
        of_x = token[:, None].to(tl.int64) * D + column[None, :]
        x = tl.load(tokens + of_x, mask=(token[:, None] < T) & (column[None, :] < D), other=0.0)
        high, middle, low = _split(above)
        total += _product(low, x, UPCAST)
        total += _product(middle, x, UPCAST)
        total += _product(high, x, UPCAST)
    place = partial + (part * n + expert[:, None]) * D + column[None, :]
    tl.store(place, total, mask=(expert[:, None] < n) & (column[None, :] < D))
