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

    Args:
        heads: [s, b, h, d], whose last axis is dense; a view of a larger tensor will do.
        angles: float32 [s, 1, 1, r] with r <= d even; what is beyond r stays as it is.

    Returns:
        [s, b, h, d], dense.
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
        return _turn(heads, angles, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _turn(grad if grad.stride(-1) == 1 else grad.contiguous(), angles, -1.0), None


def _turn(heads: Tensor, angles: Tensor, sign: float) -> Tensor:
    s, b, h, d = heads.shape
    output = torch.empty((s, b, h, d), dtype=heads.dtype, device=heads.device)
    _rotary[(s, b)](
        *(heads, angles.reshape(s, -1), output, *heads.stride()[:3], b, h, d, angles.shape[-1]),
        SIGN=sign,
        HEADS=1 << (h - 1).bit_length(),
        HALF=1 << (d // 2 - 1).bit_length() if d > 2 else 1,
        WIDE=1 << (d - 1).bit_length(),
        num_warps=4,
    )
    return output


@triton.jit
def _rotary(
    heads, angles, output, stride_s, stride_b, stride_h, b, h, d, r,
    SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    half = r // 2
    column = tl.arange(0, HALF)
    source = heads + position * stride_s + sequence * stride_b + head[:, None] * stride_h
    target = output + ((position * b + sequence) * h + head[:, None]) * d
    inside = (head[:, None] < h) & (column[None, :] < half)
    angle = tl.load(angles + position * r + column, mask=column < half, other=0.0)
    other = tl.load(angles + position * r + half + column, mask=column < half, other=0.0)
    first = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SIGN > 0:
        turned = first * tl.cos(angle)[None, :] - second * tl.sin(angle)[None, :]
        back = second * tl.cos(other)[None, :] + first * tl.sin(other)[None, :]
    else:
        turned = first * tl.cos(angle)[None, :] + second * tl.sin(other)[None, :]
        back = second * tl.cos(other)[None, :] - first * tl.sin(angle)[None, :]
    tl.store(target + column[None, :], turned.to(output.dtype.element_ty), mask=inside)
    tl.store(target + half + column[None, :], back.to(output.dtype.element_ty), mask=inside)
    if r < d:
        wide = tl.arange(0, WIDE)
        rest = (head[:, None] < h) & (wide[None, :] >= r) & (wide[None, :] < d)
        tl.store(target + wide[None, :], tl.load(source + wide[None, :], mask=rest, other=0.0), mask=rest)
