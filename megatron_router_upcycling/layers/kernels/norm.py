"""RMSNorm, one kernel forward and two backward.

Symbols: T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

WIDEST = 8192  # hidden size that a program holds
PROGRAMS = 1056  # backward: eight on each of a Hopper's 132 multiprocessors


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis [..., D], in float32 inside; and x.

    Where the x that comes back goes into a residual, the norm's backward kernel adds that gradient as well.
    """
    if kernels.usable(x, weight) and x.shape[-1] <= WIDEST and x.numel() > 0:
        return _RMSNorm.apply(x, weight, epsilon)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon), x


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        width = x.shape[-1]
        output = torch.empty_like(x)
        scales = x.new_empty(x.numel() // width, dtype=torch.float32)
        block = kernels.block_size(width, WIDEST)
        _norm[scales.shape](x, weight, output, scales, width, epsilon, block)
        ctx.save_for_backward(x, weight, scales)
        ctx.set_materialize_grads(False)
        return output, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        beside = None if beside is None else beside.contiguous()
        width, tokens = x.shape[-1], scales.numel()
        grad_x = torch.empty_like(x)
        programs = min(PROGRAMS, tokens)
        partial = x.new_empty((programs, width), dtype=torch.float32)
        block = kernels.block_size(width, WIDEST)
        tensors = grad, beside, x, weight, scales, grad_x, partial
        _norm_grad[(programs,)](*tensors, tokens, programs, width, block)
        return grad_x, partial.sum(0).to(weight.dtype), None


@triton.jit
def _norm(x, weight, output, scales, width, epsilon, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = value * scale * factor
    tl.store(output + token * width + column, normed.to(output.dtype.element_ty), mask=inside)
    tl.store(scales + token, scale)


@triton.jit
def _norm_grad(
    grad, beside, x, weight, scales, grad_x, partial, tokens, programs, width, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(program, tokens, programs):
        place = (tl.zeros((BLOCK,), tl.int64) + token) * width + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + token)
        normed = value * scale
        total += above * normed
        above = above * factor
        mean = tl.sum(above * normed, 0) / width
        value = (above - normed * mean) * scale
        if beside is not None:
            value += tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, value.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + program * width + column, total, mask=inside)
