"""Puts faster kernels in Megatron's way on a GPU, with Transformer Engine and without it.

What this project's layers bring themselves (experts, dispatcher, router) is not here: these are the parts
that Megatron builds. ``install()`` returns their names for the line at the start of a run.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import distributed_data_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer import torch_norm
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_router_upcycling.layers import experts, kernels
from megatron_router_upcycling.layers.attention import SdpaAttention
from megatron_router_upcycling.layers.kernels import accumulate, cross_entropy, norm, rotary
from megatron_router_upcycling.training import attention_choice
from megatron_router_upcycling.training.patches import patching

_wrap = functools.partial(patching.wrap, "gpu_kernels")


def install(args: Namespace, with_te: bool, attention: str) -> list[str]:
    """Wrap what Megatron builds its layers and its loss of; return what a run now uses, a phrase each.

    Args:
        attention: as ``attention_choice.choose`` chose it.
    """
    used = []
    if kernels.WANTED:
        _wrap(language_module, "fused_vocab_parallel_cross_entropy", _read_logits_once)
        used.append(
            "Triton kernels for router, experts, permutation, norms, rotary embedding and cross entropy"
        )
        if not (with_te and args.apply_rope_fusion):
            _wrap(rope_utils, "_apply_rotary_pos_emb_bshd", _rotate_in_one_kernel)
        _wrap(
            tensor_parallel_layers, "linear_with_grad_accumulation_and_async_allreduce", _add_bias_in_product
        )
        if not with_te:
            _wrap(torch_norm.WrappedTorchNorm, "__new__", _norm_in_one_kernel)
        _wrap(
            distributed_data_parallel.DistributedDataParallel,
            "_make_backward_post_hook",
            _add_gradients_faster,
        )
    if with_te and attention != attention_choice.ENGINE:
        replace_attention(SdpaAttention if attention == attention_choice.SDPA else DotProductAttention)
    used.append(f"attention: {attention_choice.describe(args, attention)}")
    if args.num_experts and args.moe_grouped_gemm:
        why_not = experts.usable("cuda") if with_te else None
        if with_te and why_not is None:
            group_experts_with_te()
        used.append(f"experts: {describe_experts(args, with_te, why_not)}")
    return used


def replace_attention(module: type) -> None:
    """``module``, which has no parameters, for Transformer Engine's attention."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    def core_attention(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: module

    _wrap(TESpecProvider, "core_attention", core_attention)


def group_experts_with_te() -> None:
    """PyTorch's grouped products where they cover the model, else Transformer Engine's grouped linears."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.backends import LocalSpecProvider

    def modules(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(self: Any, moe_use_grouped_gemm: bool) -> Any:
            theirs = original(self, moe_use_grouped_gemm)
            if not moe_use_grouped_gemm:
                return theirs
            loop = LocalSpecProvider().grouped_mlp_modules(False)

            def build(
                num_local_experts: int, config: Any, pg_collection: Any = None, name: Any = None
            ) -> Any:
                ours = experts.covers(config, pg_collection.expt_tp.size())
                if ours:
                    linears = loop.keywords["submodules"]
                    return experts.GroupedExperts(num_local_experts, config, linears, pg_collection, name)
                return theirs(num_local_experts, config, pg_collection=pg_collection, name=name)

            return build

        return choose

    _wrap(TESpecProvider, "grouped_mlp_modules", modules)


def _add_bias_in_product(original: Callable[..., Any]) -> Callable[..., Any]:
    """A linear layer with a bias (Qwen's queries, keys and values) as one product, if nothing overlaps it."""

    def linear(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: Any = None,
        **others: Any,
    ) -> Tensor:
        overlapped = gradient_accumulation_fusion or allreduce_dgrad or sequence_parallel
        if bias is None or overlapped or grad_output_buffer is not None:
            flags = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel
            return original(input, weight, bias, *flags, grad_output_buffer, **others)
        return torch.nn.functional.linear(input, weight, bias)

    return linear


def describe_experts(args: Namespace, with_te: bool, why_not: str | None) -> str:
    """Whose products experts are, from Megatron's arguments before they are validated."""
    of_te = "Transformer Engine's grouped linears" if with_te else "one by one"
    if why_not:
        return f"{of_te} ({why_not})"
    covered = (
        args.swiglu
        and not args.add_bias_linear
        and args.bf16
        and not args.fp8
        and "moe_act" not in (args.recompute_modules or ())
        and (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) == 1
    )
    return "PyTorch's grouped products" if covered else of_te


def _read_logits_once(original: Callable[..., Any]) -> Callable[..., Any]:
    def loss(logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
        if tp_group.size() > 1 or not kernels.usable(logits, target):
            return original(logits, target, tp_group)
        flat = logits.reshape(-1, logits.shape[-1])
        return cross_entropy.cross_entropy(flat, target.reshape(-1)).view(target.shape)

    return loss


def _rotate_in_one_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(
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

    return apply


def _norm_in_one_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same module, named and saved as before, with another forward pass."""

    class RMSNorm(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return norm.rms_norm(x, self.weight, self.eps)

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        built = original(cls, config, *args, **kwargs)
        if type(built) is torch.nn.RMSNorm:
            built.__class__ = RMSNorm
        return built

    return build


def _add_gradients_faster(original: Callable[..., Any]) -> Callable[..., Any]:
    """The hook that adds a parameter's gradient to its buffer, with our addition for PyTorch's."""

    def make(self: Any, param: torch.nn.Parameter) -> Callable[..., Any]:
        hook = original(self, param)

        def call(*unused: Any) -> None:
            if distributed_data_parallel.is_graph_capturing():
                return hook(*unused)
            mixed = param.grad is not None and param.grad.dtype is torch.bfloat16
            if mixed and not param.grad_added_to_main_grad and param.main_grad.dtype is torch.float32:
                accumulate.add_(param.main_grad, param.grad.data)
                param.grad_added_to_main_grad = True  # the hook adds nothing then
                hook(*unused)
                # Left set, a CUDA graph captured later would take it that its own layer adds the gradient.
                param.grad_added_to_main_grad = False
                return
            hook(*unused)

        return call

    return make
