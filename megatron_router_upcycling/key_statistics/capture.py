"""Take key vectors and router inputs out of a running Megatron model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics.moments import KeySums, attending_heads
from megatron_router_upcycling.key_statistics.router_sample import RouterInput
from megatron_router_upcycling.training.patches import patching

SELF_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
type Take = Callable[[torch.Tensor, torch.Tensor], None]


@contextlib.contextmanager
def capture_keys(model: Sequence[torch.nn.Module], sums: KeySums, key_source: str) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` adds its keys to ``sums``.

    Args:
        model: this rank's model chunks, wrapped or not.
        key_source: ``pre_rope``: the key as ``SelfAttention.get_query_key_value_tensors`` returns it,
            with its bias and its key norm. ``post_rope``: the key that core attention is called with.
    """
    hook = _take_before_rotary if key_source == "pre_rope" else _take_after_rotary
    with contextlib.ExitStack() as stack:
        for attention in self_attentions(model):
            stack.callback(hook(attention, _taker(attention, sums)))
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


def _taker(attention: Any, sums: KeySums) -> Take:
    """A function that adds one layer's keys [..., groups, d], given queries [..., heads, d], to ``sums``."""
    from megatron.core.utils import get_pg_rank

    layer = attention.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
    num_groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    first_group = get_pg_rank(attention.pg_collection.tp) * num_groups

    def take(query: torch.Tensor, key: torch.Tensor) -> None:
        assert tuple(key.shape[-2:]) == (num_groups, size), f"{SELF_ATTENTION}: keys of {list(key.shape)}"
        sums.add(layer, first_group, key, attending_heads(query, key, attention.pg_collection.cp))

    return take


def _take_before_rotary(attention: Any, take: Take) -> Callable[[], None]:
    """Wrap the instance's ``get_query_key_value_tensors``; return what undoes it."""
    name = "get_query_key_value_tensors"
    original = patching.find("key statistics", attention, name, place=SELF_ATTENTION)

    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if len(output) == 2:  # unsplit, for a fused rotary kernel: (..., groups, queries + key + value)
            mixed, sizes = output
            query, key, _ = mixed.split(sizes, dim=-1)
            take(query.unflatten(-1, (-1, key.shape[-1])).flatten(-3, -2), key)
        else:
            take(*output[:2])
        return output

    setattr(attention, name, call)
    return lambda: delattr(attention, name)


def _take_after_rotary(attention: Any, take: Take) -> Callable[[], None]:
    """Hook core attention, which is called with query and key; return what undoes it."""
    core = getattr(attention, "core_attention", None)
    if not isinstance(core, torch.nn.Module):
        raise patching.changed("key statistics", f"{SELF_ATTENTION}.core_attention is not a module")

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key"), args, strict=False)) | kwargs
        take(given["query"], given["key"])

    return core.register_forward_pre_hook(hook, with_kwargs=True).remove


@contextlib.contextmanager
def capture_router_input(model: Sequence[torch.nn.Module], sample: RouterInput) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` gives its tokens to ``sample``."""
    from megatron.core.utils import get_attr_wrapped_model

    with contextlib.ExitStack() as stack:
        for chunk in model:
            for layer in get_attr_wrapped_model(chunk, "decoder").layers:
                norm = _norm_inside(layer.mlp, layer.config)
                take = partial(sample.take, layer.layer_number - 1, norm)
                stack.callback(layer.mlp.register_forward_pre_hook(take).remove)
        yield


def _norm_inside(mlp: torch.nn.Module, config: Any) -> Any:
    """What an FFN does to its input before FC1: with Transformer Engine, FC1 holds the norm."""
    weight = getattr(mlp.linear_fc1, "layer_norm_weight", None)
    if weight is None:
        return lambda hidden: hidden

    def norm(hidden: torch.Tensor) -> torch.Tensor:
        gain = weight.float() + config.layernorm_zero_centered_gamma
        size, epsilon = (hidden.shape[-1],), config.layernorm_epsilon
        if config.normalization == "RMSNorm":
            return torch.nn.functional.rms_norm(hidden.float(), size, gain, epsilon)
        bias = mlp.linear_fc1.layer_norm_bias
        return torch.nn.functional.layer_norm(hidden.float(), size, gain, bias.float(), epsilon)

    return norm
