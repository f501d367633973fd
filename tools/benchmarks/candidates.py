"""Kernels that might be faster than those of a run, for ``bench_step.py --try NAME``: right here, or refused.

Nothing in training uses them. A newer cuDNN needs no entry: torch takes the one that is installed.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TOLERANCE = 2e-2  # bfloat16, of the largest value


def _flash_attn_4() -> Callable[..., Tensor]:
    """The package flash-attn-4 (FlashAttention in CuTe), which takes [batch, sequence, heads, d]."""
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, **_: Any
    ) -> Tensor:
        parts = (part.transpose(1, 2).contiguous() for part in (query, key, value))
        found = flash_attn_func(*parts, causal=is_causal, softmax_scale=scale)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


def _of_pytorch(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(*args, **kwargs)

    return attend


# Name -> the package that it needs, and what makes its attention.
CANDIDATES: dict[str, tuple[str, Callable[[], Callable[..., Tensor]]]] = {
    "flash-attn-4": ("flash_attn.cute", _flash_attn_4),
    "torch-flash": ("torch", functools.partial(_of_pytorch, SDPBackend.FLASH_ATTENTION)),
    "torch-cudnn": ("torch", functools.partial(_of_pytorch, SDPBackend.CUDNN_ATTENTION)),
    "torch-math": ("torch", functools.partial(_of_pytorch, SDPBackend.MATH)),
}


def missing(name: str) -> str | None:
    """The package that the candidate needs and that is not installed, or None."""
    package = CANDIDATES[name][0]
    try:
        return None if importlib.util.find_spec(package) else package
    except ModuleNotFoundError:  # not even the package that it is in
        return package


def take(name: str) -> None:
    """Let this process's attention be the candidate's, if it is right on this device."""
    from megatron_router_upcycling.layers import attention

    if package := missing(name):
        raise SystemExit(f"error: --try {name}: {package} is not installed")
    attend = CANDIDATES[name][1]()
    if (worst := difference(attend)) > TOLERANCE:
        raise SystemExit(
            f"error: --try {name}: its attention is {worst:.1e} from float32, over {TOLERANCE:.0e}"
        )
    attention.scaled_dot_product_attention = attend  # type: ignore[attr-defined]


def difference(attend: Callable[..., Tensor]) -> float:
    """The largest relative difference, forward and backward, from causal attention as written, in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((2, 4, 128, 64), generator=generator) for _ in range(4)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        *parts, grad = (tensor.to(device, torch.bfloat16).to(dtype) for tensor in drawn)
        query, key, value = (part.requires_grad_() for part in parts)
        if dtype is torch.bfloat16:
            found = attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.125)
        else:
            hidden = torch.ones(128, 128, dtype=torch.bool, device=device).triu(1)
            scores = (query @ key.mT * 0.125).masked_fill(hidden, -torch.inf)
            found = scores.softmax(dim=-1) @ value
        results.append([found, *torch.autograd.grad(found, (query, key, value), grad)])
    with torch.no_grad():
        pairs = [(a.float(), b) for a, b in zip(*results, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
