"""Add a gradient to the float32 buffer that accumulates it, at memory bandwidth.

PyTorch's addition of a bfloat16 tensor to a float32 one loads and stores single elements.
"""

from torch import Tensor

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

BLOCK = 4096


def add_(total: Tensor, part: Tensor) -> None:
    """total += part; both of one shape, ``total`` float32."""
    if not (kernels.usable(total, part) and total.is_contiguous() and part.is_contiguous()):
        total.add_(part)
        return
    count = total.numel()
    _accumulate[(kernels.blocks(count, BLOCK),)](total, part, count, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _accumulate(total, part, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(total + place, mask=inside, other=0.0)
    tl.store(total + place, value + tl.load(part + place, mask=inside, other=0.0).to(tl.float32), mask=inside)
