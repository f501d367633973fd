"""Rotary position embedding of one tensor of heads, one kernel each way, from a view of the fused projection.

Symbols: s positions, b sequences, h heads, d head size, r rotated part of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, in float32 inside (RoFormer, in the layout of GPT-NeoX and Qwen).

    ``heads`` [s, b, h, d] may be a view of a larger tensor; the result is dense. ``angles`` are float32
    [s, 1, 1, r] with r <= d even; columns from r on are unchanged.
    """
    if kernels.usable(heads, angles) and heads.stride(-1) == 1:
        return _Rotate.apply(heads, angles)
    return plain(heads, angles)


def plain(heads: Tensor, angles: Tensor) -> Tensor:
    r = angles.shape[-1]
    x, rest = heads[..., :r].float(), heads[..., r:]
    first, second = x.chunk(2, dim=-1)
    turned = x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _turn(heads, angles, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _turn(grad if grad.stride(-1) == 1 else grad.contiguous(), angles, back=True), None


def _turn(heads: Tensor, angles: Tensor, back: bool) -> Tensor:
    s, b, h, d = heads.shape
    output = heads.new_empty(heads.shape)
    covers = (1 << (size - 1).bit_length() for size in (h, d))
    sizes = *heads.stride()[:3], b, h, d, angles.shape[-1]
    _rotary[(s, b)](heads, angles.reshape(s, -1), output, *sizes, back, *covers, num_warps=2)
    return output


@triton.jit
def _rotary(
    heads, angles, output, stride_s, stride_b, stride_h, b, h, d, r,
    BACK: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    half = r // 2
    # Each element is rotated together with the one r / 2 columns away.
    partner = tl.where(column < half, column + half, column - half)
    turned = column < r
    angle = tl.load(angles + position * r + column, mask=turned, other=0.0)
    of_sine = tl.load(angles + position * r + partner, mask=turned, other=0.0) if BACK else angle
    sine = tl.where((column < half) != BACK, -tl.sin(of_sine), tl.sin(of_sine))
    source = heads + position * stride_s + sequence * stride_b + head[:, None] * stride_h
    inside = (head[:, None] < h) & (column[None, :] < d)
    own = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
    value = own * tl.cos(angle)[None, :] + other * sine[None, :]
    target = output + ((position * b + sequence) * h + head[:, None]) * d + column[None, :]
    tl.store(target, value.to(output.dtype.element_ty), mask=inside)
