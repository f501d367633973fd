"""Triton kernels of a layer, each next to the plain PyTorch that it is tested against.

On a GPU with Triton an operation is one or two launches; elsewhere the plain form runs. With
``TRITON_INTERPRET=1``, as in the tests, the kernels run on the CPU too.
"""

import os
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:  # PyTorch's CPU builds come without it
    INSTALLED = False

    class _Absent:  # lets kernels be defined; ``usable`` keeps them from being called
        def __getattr__(self, name: str) -> Any:
            return lambda function=None, **options: function

    triton = tl = _Absent()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# MEGATRON_ROUTER_UPCYCLING_KERNELS=off is for a machine on which kernels fail: plain PyTorch replaces them.
WANTED = INSTALLED and os.environ.get("MEGATRON_ROUTER_UPCYCLING_KERNELS") != "off"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors."""
    return WANTED and (INTERPRETED or all(tensor.is_cuda for tensor in tensors))


def block_size(width: int, largest: int = 4096) -> int:
    """The smallest power of two, from 16 on, that is at least ``width``; at most ``largest``."""
    return min(largest, 1 << max(4, (width - 1).bit_length()))


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` cover ``count``."""
    return -(-count // size)


__all__ = ["INSTALLED", "INTERPRETED", "WANTED", "block_size", "blocks", "tl", "triton", "usable"]
