"""What Megatron needs where neither Transformer Engine nor apex is installed, on a GPU and on the CPU alike.

Two parts of megatron-core 0.19 fall back to plain PyTorch there and are not finished: the norm refuses
sequence parallelism, and the distributed optimizer cannot load what it saved. Two more are slow: attention
materialises its scores, and experts are multiplied one by one. ``install()`` fixes all four, once; it changes
nothing where Transformer Engine or apex is in use.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models import backends
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer import torch_norm
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_router_upcycling.layers.attention import SdpaAttention
from megatron_router_upcycling.layers.experts import build_experts
from megatron_router_upcycling.training.patches import patching

_wrap = functools.partial(patching.wrap, "without_te")


def install(unfused_attention: bool = False) -> None:
    """Fix the norm and the distributed optimizer, and let local layer specs build what is faster.

    Args:
        unfused_attention: leave Megatron's own attention in place.
    """
    _wrap(torch_norm.WrappedTorchNorm, "__new__", _allow_sequence_parallel)
    if not unfused_attention:
        _wrap(backends.LocalSpecProvider, "core_attention", _attend_without_scores)
    _wrap(backends.LocalSpecProvider, "grouped_mlp_modules", _group_experts)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        # Resume exactly with PyTorch's Adam, which keeps its step as a tensor.
        optimizer = distrib_optimizer.DistributedOptimizer
        _wrap(optimizer, "state_dict", _give_first_step)
        _wrap(optimizer, "load_state_dict", _give_each_its_step)
        _wrap(optimizer, "_set_main_param_and_optimizer_states", _allow_no_step)


def _attend_without_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SdpaAttention`` in place of ``DotProductAttention``, which materialises its scores."""

    def core_attention(self: Any) -> type[torch.nn.Module]:
        if (found := original(self)) is not DotProductAttention:
            raise patching.changed(
                "without_te", f"LocalSpecProvider.core_attention is {found!r}, not DotProductAttention"
            )
        return SdpaAttention

    return core_attention


def _group_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Grouped products for ``--moe-grouped-gemm``, which ``device.adapt`` leaves set where it works."""

    def build(self: Any, moe_use_grouped_gemm: bool) -> Any:
        experts = original(self, moe_use_grouped_gemm)
        if not moe_use_grouped_gemm:
            return experts
        if not isinstance(experts, functools.partial) or experts.func is not SequentialMLP:
            raise patching.changed(
                "without_te", "LocalSpecProvider.grouped_mlp_modules is not partial(SequentialMLP, ...)"
            )
        return functools.partial(build_experts, *experts.args, **experts.keywords)

    return build


def _allow_sequence_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let PyTorch's norm run under sequence parallelism.

    ``WrappedTorchNorm`` refuses it, and MoE with tensor parallelism needs it. The norm acts on each token
    alone, so it is right there as long as its parameters are marked ``sequence_parallel``, which makes
    Megatron sum their gradients over the tensor-parallel ranks (``finalize_model_grads``).
    """

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            norm = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return build


def _give_first_step(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """``state_dict()``, called to load, expects a step; Adam has none before its first one."""

    def call(self: Any) -> Any:
        inner = self.optimizer
        parameters = [p for group in inner.param_groups for p in group["params"]]
        if any(inner.state.values()) or not parameters:
            return state_dict(self)
        inner.state[parameters[0]] = {"step": torch.zeros(())}
        try:
            return state_dict(self)
        finally:
            inner.state.clear()

    return call


def _give_each_its_step(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron hands one tensor to all parameters: Adam would count it up once for each."""

    @torch.no_grad()  # in float32 the optimizer's shard is a view of the parameter itself
    def call(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    return call


def _allow_no_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """The fully reshardable form keeps the step apart from the tensors that it hands over."""

    def call(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None} | tensors)

    return call
