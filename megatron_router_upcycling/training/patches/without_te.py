"""What Megatron needs where neither Transformer Engine nor apex is installed, on a GPU and on the CPU alike.

Two parts of megatron-core 0.19 fall back to plain PyTorch there and are not finished: the norm refuses
sequence parallelism, and the distributed optimizer cannot load what it saved. Two more are slow: attention
materialises its scores, and experts are multiplied one by one. ``install()`` mends all four, once; it changes
nothing where Transformer Engine or apex is in use.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models import backends
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer import torch_norm
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_router_upcycling.layers.attention import core_attention
from megatron_router_upcycling.layers.experts import GroupedExperts

_installed = False


def install() -> None:
    """Mend the norm and the distributed optimizer, and let local layer specs build what is faster.

    Raises:
        RuntimeError: an upstream symbol that is wrapped has gone.
    """
    global _installed
    if _installed:
        return
    _allow_sequence_parallel_torch_norm()
    _wrap(
        backends.LocalSpecProvider, "core_attention", lambda named: lambda self: core_attention(named(self))
    )
    _wrap(backends.LocalSpecProvider, "grouped_mlp_modules", _group_experts)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _mend_distributed_optimizer()
    _installed = True


def _wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if name not in vars(owner):
        raise RuntimeError(
            f"without_te: {owner.__name__}.{name} does not exist in this version of megatron-core;"
            " tested with 0.19"
        )
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def _group_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """With ``--moe-grouped-gemm``, which ``device.adapt`` leaves set only where it works: GroupedExperts."""

    def build(self: Any, moe_use_grouped_gemm: bool) -> Any:
        experts = original(self, moe_use_grouped_gemm)
        if not moe_use_grouped_gemm:
            return experts
        if not isinstance(experts, functools.partial) or experts.func is not SequentialMLP:
            raise RuntimeError(
                "without_te: LocalSpecProvider.grouped_mlp_modules is not partial(SequentialMLP, ...) in this"
                " version of megatron-core; tested with 0.19"
            )
        return functools.partial(GroupedExperts, *experts.args, **experts.keywords)

    return build


def _allow_sequence_parallel_torch_norm() -> None:
    """Let PyTorch's norm run under sequence parallelism.

    ``WrappedTorchNorm`` refuses it, and MoE with tensor parallelism needs it. The norm acts on each token
    alone, so it is right there as long as its parameters are marked ``sequence_parallel``, which makes
    Megatron sum their gradients over the tensor-parallel ranks (``finalize_model_grads``).
    """

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
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

    _wrap(torch_norm.WrappedTorchNorm, "__new__", wrapper)


def _mend_distributed_optimizer() -> None:
    """Make ``DistributedOptimizer`` resume exactly with PyTorch's Adam, which keeps its step as a tensor."""
    optimizer = distrib_optimizer.DistributedOptimizer

    def give_first_step(state_dict: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any) -> Any:
            """state_dict(), called to load, expects a step; Adam has none before its first one."""
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

    def own_steps(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()  # in float32 the optimizer's shard is a view of the parameter itself
        def call(self: Any, state_dict: Any) -> None:
            load_state_dict(self, state_dict)
            for state in self.optimizer.state.values():
                # One tensor was handed to all parameters: Adam would count it up once for each.
                state["step"] = state["step"].clone()

        return call

    def without_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            """The fully reshardable form keeps the step apart from the tensors that it hands over."""
            set_states(self, model_param, {"step": None} | tensors)

        return call

    _wrap(optimizer, "state_dict", give_first_step)
    _wrap(optimizer, "load_state_dict", own_steps)
    _wrap(optimizer, "_set_main_param_and_optimizer_states", without_step)
