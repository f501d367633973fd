"""SwiGLU of the experts times the router's probability, one kernel each way.

Symbols: R rows (a token's copy for one expert), F the experts' FFN width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton


def weighted_swiglu(hidden: Tensor, probs: Tensor) -> Tensor:
    """silu(gate) * up * probability, in float32 inside: [R, F] in the dtype of ``hidden``.

    ``hidden`` is [R, 2F], the gate's half first; ``probs`` [R] of any float dtype.
    """
    if kernels.usable(hidden, probs) and hidden.shape[0] > 0:
        return _WeightedSwiGLU.apply(hidden, probs)
    return plain(hidden, probs)


def plain(hidden: Tensor, probs: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * probs.float().unsqueeze(-1)).to(hidden.dtype)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probs: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        rows, width = hidden.shape[0], hidden.shape[1] // 2
        output = hidden.new_empty(rows, width)
        _swiglu[(rows,)](hidden, probs, output, width, kernels.block_size(width, 1024))
        ctx.save_for_backward(hidden, probs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, probs = ctx.saved_tensors
        rows, width = hidden.shape[0], hidden.shape[1] // 2
        grad_hidden = torch.empty_like(hidden)
        grad_probs = hidden.new_empty(rows, dtype=torch.float32)
        block = kernels.block_size(width, 1024)
        _swiglu_grad[(rows,)](grad.contiguous(), hidden, probs, grad_hidden, grad_probs, width, block)
        return grad_hidden, grad_probs.to(probs.dtype)


@triton.jit
def _swiglu(hidden, probs, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(hidden + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * prob
        tl.store(output + row * width + column, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_grad(grad, hidden, probs, grad_hidden, grad_probs, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(hidden + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += above * silu * up
        weighted = above * prob
        grad_gate = weighted * up * (sigmoid + silu * (1 - sigmoid))
        place = grad_hidden + row * 2 * width + column
        tl.store(place, grad_gate.to(grad_hidden.dtype.element_ty), mask=inside)
        tl.store(place + width, (weighted * silu).to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_probs + row, tl.sum(total, 0))
