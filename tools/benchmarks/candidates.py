"""Kernels that might be faster than those of a run, for ``bench_step.py --try NAME``: right here, or refused.

Nothing in training uses them. A newer cuDNN needs no entry: torch takes the one that is installed.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu

from megatron_router_upcycling.errors import UserError

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


def _sonic_moe() -> Callable[..., Tensor]:
    """The package sonic-moe: gather, products and SwiGLU in one kernel each way."""
    from sonicmoe import moe_general_routing_inputs  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    def compute(tokens: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, top_k: int) -> Tensor:
        weights, chosen = probs.topk(top_k, dim=1)  # all others are 0
        token = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device).repeat_interleave(top_k)
        routed = weights.flatten(), token, chosen.flatten().int()
        matrices = fc1.permute(1, 2, 0), None, fc2.permute(1, 2, 0), None
        stream = torch.cuda.current_stream().cuda_stream
        options = {"activation_type": ActivationType.SWIGLU, "concat_layout": True}  # the gate's half first
        return moe_general_routing_inputs(tokens, *routed, *matrices, len(fc1), stream, **options)[0]

    return compute


def _all_experts() -> Callable[..., Tensor]:
    """Every expert for every token, as written: for tests."""

    def compute(tokens: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, top_k: int) -> Tensor:
        gate, up = torch.einsum("td,nfd->ntf", tokens, fc1).chunk(2, dim=-1)
        hidden = silu(gate) * up * probs.t().unsqueeze(-1).to(tokens.dtype)
        return torch.einsum("ntf,ndf->td", hidden, fc2)

    return compute


def _put_attention(attend: Callable[..., Tensor]) -> None:
    from megatron_router_upcycling.layers import attention

    attention.scaled_dot_product_attention = attend  # type: ignore[attr-defined]


def _put_experts(compute: Callable[..., Tensor]) -> None:
    """Between dispatcher and experts go the tokens [T, D] and their weights [T, n], not rows."""
    from megatron_router_upcycling.layers.dispatch import OneRankDispatcher
    from megatron_router_upcycling.layers.experts import GroupedExperts

    def preprocess(self: Any, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape, self.counts = tokens.shape, routing_map.sum(dim=0)
        return tokens.reshape(-1, tokens.shape[-1]), probs

    def forward(self: Any, tokens: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        matrices = self.linear_fc1_weight, self.linear_fc2_weight
        return compute(tokens, probs, *matrices, self.config.moe_router_topk), None

    changed: Any = OneRankDispatcher
    changed.dispatch_preprocess = preprocess
    changed.dispatch_postprocess = lambda self, tokens, probs: (tokens, self.counts, probs)
    changed.combine_postprocess = lambda self, tokens: tokens.view(self.shape)
    GroupedExperts.forward = forward  # type: ignore[method-assign, assignment]


def _zero_gradients() -> None:
    """Buffers of gradients are zeroed before a step, and Megatron adds to them with PyTorch's kernel."""
    from megatron_router_upcycling.training.patches import gradients

    gradients.install = lambda args: None  # type: ignore[assignment]


class Candidate(NamedTuple):
    package: str  # that it needs
    part: str  # of a step that it replaces
    make: Callable[[], Any]


CANDIDATES = {
    "flash-attn-4": Candidate("flash_attn.cute", "attention", _flash_attn_4),
    "torch-flash": Candidate("torch", "attention", partial(_of_pytorch, SDPBackend.FLASH_ATTENTION)),
    "torch-cudnn": Candidate("torch", "attention", partial(_of_pytorch, SDPBackend.CUDNN_ATTENTION)),
    "torch-math": Candidate("torch", "attention", partial(_of_pytorch, SDPBackend.MATH)),
    "sonic-moe": Candidate("sonicmoe", "experts", _sonic_moe),
    "all-experts": Candidate("torch", "experts", _all_experts),
    "gradients-zeroed": Candidate("torch", "gradients", _zero_gradients),
}
FOR_TESTS = ("torch-math", "all-experts")  # too slow to be tried


def missing(name: str) -> str | None:
    """The package that the candidate needs and that is not installed, or None."""
    package = CANDIDATES[name].package
    try:
        return None if importlib.util.find_spec(package) else package
    except ModuleNotFoundError:  # not even the package that it is in
        return package


def take(name: str) -> None:
    """Let this process take the candidate for its part, if it is right on this device."""
    if package := missing(name):
        raise UserError(f"--try {name}: {package} is not installed")
    compute, part = CANDIDATES[name].make(), CANDIDATES[name].part
    if part == "gradients":
        return
    if (worst := difference(part, compute)) > TOLERANCE:
        raise UserError(f"--try {name}: {part} are {worst:.1e} from float32, over {TOLERANCE:.0e}")
    PARTS[part].put(compute)


def difference(part: str, compute: Callable[..., Tensor]) -> float:
    """The largest relative difference, forward and backward, of ``compute`` in bfloat16 from float32."""
    shapes, run, exact, _ = PARTS[part]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for call, dtype in ((partial(run, compute), torch.bfloat16), (exact, torch.float32)):
        *parts, grad = (tensor.to(device, torch.bfloat16).to(dtype) for tensor in drawn)
        leaves = [value.requires_grad_() for value in parts]
        output = call(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    with torch.no_grad():
        pairs = [(a.float(), b) for a, b in zip(*results, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _attended(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.125)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as written."""
    hidden = torch.ones(128, 128, dtype=torch.bool, device=query.device).triu(1)
    return (query @ key.mT * 0.125).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value


def _mixed(compute: Callable[..., Tensor], tokens: Tensor, logits: Tensor, *matrices: Tensor) -> Tensor:
    scores = logits.float().softmax(dim=1)
    probs = torch.zeros_like(scores).scatter(1, (top := scores.topk(2, dim=1)).indices, top.values)
    return compute(tokens, probs, *(matrix / 8 for matrix in matrices), 2)


class Part(NamedTuple):
    shapes: list[tuple[int, ...]]  # of the inputs and of the output's gradient
    compute: Callable[..., Tensor]  # by a candidate, which comes first
    exact: Callable[..., Tensor]  # in float32
    put: Callable[[Callable[..., Tensor]], None]


EXPERTS: list[tuple[int, ...]] = [(256, 128), (256, 4), (4, 256, 128), (4, 128, 128), (256, 128)]
PARTS = {
    "attention": Part([(2, 4, 128, 64)] * 4, _attended, _attention, _put_attention),
    "experts": Part(EXPERTS, _mixed, partial(_mixed, _all_experts()), _put_experts),
}
