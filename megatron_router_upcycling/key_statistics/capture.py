"""Take key vectors and router inputs out of a running Megatron model.

Of the keys k_s of a query group two means are taken over tokens: the mean key itself (section 3.2 of the
paper), and for each query head h of the group the attended key: the mean over queries t of
sum_s softmax(q_t^h . k_s)_s k_s, what the head's attention would return with the keys as its values.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics.moments import TokenMean
from megatron_router_upcycling.key_statistics.router_sample import RouterInput
from megatron_router_upcycling.training.patches import patching

SELF_ATTENTION = "megatron.core.transformer.attention.SelfAttention"


@dataclass
class KeyMeans:
    """The running means of a whole model; this rank adds to its own layers and heads.

    ``keys`` [L, G, d] are taken in every forward pass, ``attended`` [L, H, d] while ``attend`` is true: they
    cost a second call of attention.
    """

    keys: TokenMean
    attended: TokenMean
    attend: bool = True


@contextlib.contextmanager
def capture_keys(model: Sequence[torch.nn.Module], means: KeyMeans, key_source: str) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` adds its keys to ``means``.

    Args:
        model: this rank's model chunks (several under virtual pipeline parallelism), wrapped or not.
        key_source: ``pre_rope``: the key as ``SelfAttention.get_query_key_value_tensors`` returns it,
            with its bias and its key norm. ``post_rope``: the key that core attention is called with.

    Raises:
        RuntimeError: Megatron no longer has the symbols that keys are captured at.
    """
    with contextlib.ExitStack() as stack:
        for attention in self_attentions(model):
            capture = _Capture(attention, means)
            if key_source == "pre_rope":
                stack.callback(_wrap_projection(attention, capture.before_rotary))
            stack.callback(_hook_core_attention(attention, capture.at_attention))
        yield


def self_attentions(model: Sequence[torch.nn.Module]) -> list[Any]:
    """The ``SelfAttention`` modules of this rank's decoder layers, in order."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.utils import get_attr_wrapped_model

    attentions = []
    for chunk in model:
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            attention = getattr(layer, "self_attention", None)
            if not isinstance(attention, SelfAttention):
                raise UserError(
                    f"--load: layer {layer.layer_number} has {type(attention).__name__} where keys are"
                    f" collected from {SELF_ATTENTION} alone; use a dense model with ordinary attention"
                )
            attentions.append(attention)
    return attentions


class _Capture:
    """Adds one layer's keys, those of this rank's query groups and heads, to ``means``."""

    def __init__(self, attention: Any, means: KeyMeans) -> None:
        from megatron.core.utils import get_pg_rank

        self.means = means
        self.layer = attention.layer_number - 1  # Megatron counts from 1, over all pipeline stages
        self.num_groups = attention.num_query_groups_per_partition
        self.num_heads = attention.num_attention_heads_per_partition
        self.head_dim = attention.hidden_size_per_attention_head
        self.rank = get_pg_rank(attention.pg_collection.tp)
        self.key: torch.Tensor | None = None  # before the rotary embedding, until attention is called

    def before_rotary(self, key: torch.Tensor) -> None:
        self.key = key

    def at_attention(self, forward: Callable[..., torch.Tensor], args: list[Any], kwargs: Any) -> None:
        """Take the key [..., groups, d] that core attention stands before a call with."""
        called_with = args[1]
        key, self.key = called_with if self.key is None else self.key, None
        if tuple(key.shape[-2:]) != (self.num_groups, self.head_dim):
            raise RuntimeError(
                f"key statistics: layer {self.layer} gives keys {list(key.shape)} where [...,"
                f" {self.num_groups}, {self.head_dim}] is expected from {SELF_ATTENTION}"
            )
        self.means.keys.add(self.layer, self.rank * self.num_groups, key)
        if self.means.attend:
            args[2] = key.reshape(called_with.shape)  # packed sequences have no axis of their own there
            attended = forward(*args, **kwargs).reshape(-1, self.num_heads, self.head_dim)
            self.means.attended.add(self.layer, self.rank * self.num_heads, attended)


def _wrap_projection(attention: Any, take: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Hand the key that the instance's ``get_query_key_value_tensors`` returns to ``take``; return what
    undoes it."""
    name = "get_query_key_value_tensors"
    original = patching.find("key statistics", attention, name, place=SELF_ATTENTION)

    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if len(output) == 2:  # unsplit, for a fused rotary kernel: (..., groups, queries + key + value)
            mixed, sizes = output
            take(mixed.split(sizes, dim=-1)[-2])
        else:
            take(output[1])
        return output

    setattr(attention, name, call)
    return lambda: delattr(attention, name)


def _hook_core_attention(
    attention: Any, take: Callable[[Callable[..., torch.Tensor], list[Any], Any], None]
) -> Callable[[], None]:
    """Call ``take`` before core attention, with its forward, its arguments as a list that begins with query,
    key and value, and its other keyword arguments; return what undoes it."""
    core = getattr(attention, "core_attention", None)
    if not isinstance(core, torch.nn.Module):
        raise patching.changed("key statistics", f"{SELF_ATTENTION}.core_attention is not a module")

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs, called = dict(kwargs), list(args)
        for name in ("query", "key", "value")[len(args) :]:
            if name not in kwargs:
                raise patching.changed(
                    "key statistics", f"{SELF_ATTENTION}.core_attention is called without a {name}"
                )
            called.append(kwargs.pop(name))
        take(module.forward, called, kwargs)

    return core.register_forward_pre_hook(hook, with_kwargs=True).remove


@contextlib.contextmanager
def capture_router_input(model: Sequence[torch.nn.Module], sample: RouterInput) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` (dense) gives its tokens to ``sample``."""
    from megatron.core.utils import get_attr_wrapped_model

    with contextlib.ExitStack() as stack:
        for chunk in model:
            for layer in get_attr_wrapped_model(chunk, "decoder").layers:
                norm = _norm_inside(layer.mlp, layer.config)
                number = layer.layer_number - 1

                def hook(
                    module: torch.nn.Module, args: tuple[Any, ...], layer: int = number, norm: Any = norm
                ) -> None:
                    sample.take(layer, args[0], norm)

                stack.callback(layer.mlp.register_forward_pre_hook(hook).remove)
        yield


def _norm_inside(mlp: torch.nn.Module, config: Any) -> Any:
    """What an FFN does to its input before FC1: with Transformer Engine, FC1 holds the norm."""
    weight = getattr(mlp.linear_fc1, "layer_norm_weight", None)
    if weight is None:
        return lambda hidden: hidden
    bias = mlp.linear_fc1.layer_norm_bias if config.normalization == "LayerNorm" else None

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        gain = weight.float() + config.layernorm_zero_centered_gamma
        size, epsilon = (hidden.shape[-1],), config.layernorm_epsilon
        if config.normalization == "RMSNorm":
            return torch.nn.functional.rms_norm(hidden.float(), size, gain, epsilon)
        shift = None if bias is None else bias.float()
        return torch.nn.functional.layer_norm(hidden.float(), size, gain, shift, epsilon)

    return norm
