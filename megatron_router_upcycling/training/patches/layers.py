"""Patch the modules of Megatron's layers and loss: fixes for plain PyTorch, and faster kernels on a GPU."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer import torch_norm
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_router_upcycling.layers import experts, kernels
from megatron_router_upcycling.layers.attention import SdpaAttention
from megatron_router_upcycling.layers.kernels import cross_entropy, norm, rotary
from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.patches import patching

# Two names, because both wrap the norm, and ``patching.wrap`` wraps once a name.
_wrap = functools.partial(patching.wrap, "layers")
_wrap_on_gpu = functools.partial(patching.wrap, "layers on a GPU")


def install_without_te(attention: str = device.SDPA) -> None:
    """Without Transformer Engine: fix the norm, and make local layer specs build the faster modules."""
    _wrap(torch_norm.WrappedTorchNorm, "__new__", _allow_sequence_parallel)
    if attention != device.MEGATRON:
        _wrap(LocalSpecProvider, "core_attention", lambda original, self: SdpaAttention)
    _wrap(LocalSpecProvider, "grouped_mlp_modules", _group_experts)


def install_on_gpu(args: Namespace, with_te: bool, attention: str) -> list[str]:
    """Wrap the modules of Megatron's layers and loss; return phrases that say which kernels a run uses."""
    used = []
    if kernels.WANTED:
        used.append(
            "Triton kernels for router, experts, permutation, norms, rotary embedding and cross entropy"
        )
        _wrap_on_gpu(language_module, "fused_vocab_parallel_cross_entropy", _read_logits_once)
        if not (with_te and args.apply_rope_fusion):
            _wrap_on_gpu(rope_utils, "_apply_rotary_pos_emb_bshd", _rotate_in_one_kernel)
        product = "linear_with_grad_accumulation_and_async_allreduce"
        _wrap_on_gpu(tensor_parallel_layers, product, _add_bias_in_product)
        if not with_te:
            _wrap_on_gpu(torch_norm.WrappedTorchNorm, "__new__", _norm_in_one_kernel)
            _wrap_on_gpu(LocalSpecProvider, "layer_norm", _norm_before_residual)
    grouped = args.num_experts and args.moe_grouped_gemm
    why_not = experts.usable("cuda") if grouped and with_te else None
    if with_te:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        if attention != device.ENGINE:
            module = SdpaAttention if attention == device.SDPA else DotProductAttention
            _wrap_on_gpu(TESpecProvider, "core_attention", lambda original, self: module)
        if grouped and why_not is None:
            _wrap_on_gpu(TESpecProvider, "grouped_mlp_modules", _group_experts)
    backend = f" ({args.attention_backend.name})" if attention == device.ENGINE else ""
    used.append(f"attention: {attention}{backend}")
    if grouped:
        theirs = "Transformer Engine's grouped linears" if with_te else "one by one"
        ours = f"PyTorch's grouped products, {theirs} where these do not cover the model"
        used.append(f"experts: {theirs} ({why_not})" if why_not else f"experts: {ours}")
    return used


def _group_experts(original: Callable[..., Any], self: Any, moe_use_grouped_gemm: bool) -> Any:
    """PyTorch's grouped matrix products if they support the model, else Megatron's modules."""
    theirs = original(self, moe_use_grouped_gemm)
    if not moe_use_grouped_gemm:
        return theirs
    linears = LocalSpecProvider().grouped_mlp_modules(False).keywords["submodules"]

    def build(num_local_experts: int, config: Any, pg_collection: Any = None, name: Any = None) -> Any:
        if experts.covers(config, pg_collection.expt_tp.size()):
            return experts.GroupedExperts(num_local_experts, config, linears, pg_collection, name)
        return theirs(num_local_experts, config, pg_collection=pg_collection, name=name)

    return build


def _allow_sequence_parallel(
    original: Callable[..., Any], cls: type, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let PyTorch's norm run under sequence parallelism, which ``WrappedTorchNorm`` refuses.

    The norm acts on each token separately, so this is correct if its parameters are marked as
    ``sequence_parallel``: Megatron (``finalize_model_grads``) then sums their gradients over TP ranks.
    """
    sequence_parallel = config.sequence_parallel
    config.sequence_parallel = False
    try:
        norm = original(cls, config, *args, **kwargs)
    finally:
        config.sequence_parallel = sequence_parallel
    for parameter in norm.parameters():
        parameter.sequence_parallel = sequence_parallel
    return norm


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's module, with the same parameter names and another forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return norm.rms_norm(x, self.weight, self.eps)[0]


class RMSNormBeforeResidual(torch.nn.RMSNorm):
    """Returns its input as well, which Megatron's layer then takes for the residual."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return norm.rms_norm(x, self.weight, self.eps)


def _norm_in_one_kernel(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    built = original(*args, **kwargs)
    if type(built) is torch.nn.RMSNorm:
        built.__class__ = RMSNorm
    return built


def _norm_before_residual(
    original: Callable[..., Any], self: Any, *args: Any, has_residual: bool = False, **kwargs: Any
) -> Callable[..., Any]:
    make = original(self, *args, has_residual=has_residual, **kwargs)

    def build(**kwargs: Any) -> Any:
        built = make(**kwargs)
        if type(built) is RMSNorm:
            built.__class__ = RMSNormBeforeResidual
        return built

    return build if has_residual else make


def _add_bias_in_product(
    original: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: Any = None,
    **others: Any,
) -> Tensor:
    """A linear layer with bias (Qwen's QKV) as one product, unless Megatron fuses or overlaps its parts."""
    flags = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel
    if bias is None or any(flags) or grad_output_buffer is not None:
        return original(input, weight, bias, *flags, grad_output_buffer, **others)
    return torch.nn.functional.linear(input, weight, bias)


def _read_logits_once(original: Callable[..., Any], logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    if tp_group.size() > 1 or not kernels.usable(logits, target):
        return original(logits, target, tp_group)
    flat = logits.reshape(-1, logits.shape[-1])
    return cross_entropy.cross_entropy(flat, target.reshape(-1)).view(target.shape)


def _rotate_in_one_kernel(
    original: Callable[..., Any],
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    *args: Any,
    mscale: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    plain = not rotary_interleaved and not args and mscale == 1.0 and not any(kwargs.values())
    if not plain or t.dim() != 4 or freqs.numel() != t.shape[0] * freqs.shape[-1]:
        return original(t, freqs, rotary_interleaved, *args, mscale=mscale, **kwargs)
    return rotary.rotate(t, freqs)
