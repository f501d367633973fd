"""Add a gradient to the buffer that accumulates it, at memory bandwidth, or write the first of a step there.

PyTorch's addition of a bfloat16 tensor to a float32 one loads and stores single elements.
"""

import torch
from torch import Tensor

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

BLOCK = 4096


def add_(total: Tensor, part: Tensor, fresh: Tensor | None = None) -> None:
    """total += part, both of one shape; total = part where ``fresh``, int32 [] on their device, is not 0."""
    if kernels.usable(total, part) and total.is_contiguous() and part.is_contiguous():
        count = total.numel()
        _accumulate[(kernels.blocks(count, BLOCK),)](total, part, fresh, count, BLOCK=BLOCK, num_warps=8)
    elif fresh is None:
        total.add_(part)
    else:
        total.copy_(torch.where(fresh == 0, total, 0).add_(part))


@triton.jit
def _accumulate(total, part, fresh, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    read = inside
    if fresh is not None:  # what is not added to is not read
        read = inside & (tl.load(fresh) == 0)
    value = tl.load(total + place, mask=read, other=0.0).to(tl.float32)
    value += tl.load(part + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, value.to(total.dtype.element_ty), mask=inside)
