"""Capture key vectors and router inputs of a running Megatron model."""

import contextlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics.moments import KeySums, attending_heads
from megatron_router_upcycling.training.patches import patching

SEED = 0
SELF_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
type Take = Callable[[torch.Tensor, torch.Tensor], None]


@contextlib.contextmanager
def capture_keys(model: Sequence[torch.nn.Module], sums: KeySums) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` adds its keys to ``sums``.

    ``model`` is this rank's model chunks, wrapped or not. Keys are taken after bias and key norm, before the
    rotary embedding.
    """
    with contextlib.ExitStack() as stack:
        for attention in self_attentions(model):
            stack.callback(_take_before_rotary(attention, partial(_add, attention, sums)))
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


def _add(attention: Any, sums: KeySums, query: torch.Tensor, key: torch.Tensor) -> None:
    """Add one layer's keys [..., groups, d], given queries [..., heads, d], to ``sums``."""
    from megatron.core.utils import get_pg_rank

    layer = attention.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
    num_groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    first_group = get_pg_rank(attention.pg_collection.tp) * num_groups
    assert tuple(key.shape[-2:]) == (num_groups, size), f"{SELF_ATTENTION}: keys of {list(key.shape)}"
    sums.add(layer, first_group, key, attending_heads(query, key, attention.pg_collection.cp))


def _take_before_rotary(attention: Any, take: Take) -> Callable[[], None]:
    """Wrap the instance's ``get_query_key_value_tensors``; return a function that undoes it."""
    name = "get_query_key_value_tensors"
    original = patching.find("key statistics", attention, name, place=SELF_ATTENTION)

    def call(*args: Any, **kwargs: Any) -> Any:
        query, key, *_ = output = original(*args, **kwargs)
        if len(output) == 2:  # unsplit, for a fused rotary kernel: (..., groups, queries + key + value)
            mixed, sizes = output
            query, key, _ = mixed.split(sizes, dim=-1)
            query = query.unflatten(-1, (-1, key.shape[-1])).flatten(-3, -2)
        take(query, key)
        return output

    setattr(attention, name, call)
    return lambda: delattr(attention, name)


class RouterInput:
    """This rank's part of a sample [L, S, D] of router inputs: hidden states after the norm before the FFN.

    The tokens of ``collect_iters`` global batches are chosen in advance by their positions in the data, so
    that any parallel layout gives the same sample. ``ranks``: this rank's number in "dp", "cp" and "tp".
    """

    def __init__(self, args: Namespace, num_tokens: int, ranks: dict[str, int]) -> None:
        total = args.collect_iters * args.global_batch_size * args.seq_length
        self.num_tokens = min(num_tokens, total)
        self.hidden_size, self.dtype = args.hidden_size, args.params_dtype
        self.calls: dict[int, int] = {}  # layer -> forward passes so far
        self.taken: dict[int, torch.Tensor] = {}  # layer -> [S, D]; rows of other ranks are zero
        self.places = defaultdict[int, list](list)  # forward pass -> (row, position, sample) of its tokens
        chosen = np.random.default_rng(SEED).choice(total, self.num_tokens, replace=False)
        for row, token in enumerate(sorted(chosen.tolist())):
            call, position, sample, is_own = _place(args, token, ranks)
            if is_own:
                self.places[call].append((row, position, sample))

    def take(self, layer: int, norm: Any, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of an FFN: store the sampled rows of its input, after ``norm``."""
        hidden = args[0]  # (sequence, batch, D)
        call = self.calls.get(layer, 0)
        self.calls[layer] = call + 1
        if layer not in self.taken:
            shape = (self.num_tokens, self.hidden_size)
            self.taken[layer] = torch.zeros(shape, dtype=self.dtype, device=hidden.device)
        if call in self.places:
            rows, positions, samples = map(list, zip(*self.places[call], strict=True))
            self.taken[layer][rows] = norm(hidden[positions, samples]).to(self.dtype)

    def gather(self, num_layers: int) -> torch.Tensor:
        """[L, S, D] on the CPU, merged over all ranks."""
        device = torch.cuda.current_device()
        merged = torch.empty((num_layers, self.num_tokens, self.hidden_size), dtype=self.dtype)
        for layer in range(num_layers):
            values = torch.zeros((self.num_tokens, self.hidden_size + 1), device=device)
            if layer in self.taken:
                values[:, :-1] = self.taken[layer]
                calls = [call for call in self.places if call < self.calls[layer]]
                values[[row for call in calls for row, _, _ in self.places[call]], -1] = 1
            torch.distributed.all_reduce(values)
            if not (values[:, -1] == 1).all():
                raise RuntimeError(
                    f"router input: of layer {layer}, {int((values[:, -1] != 1).sum())} tokens of the sample"
                    " were not seen by exactly one rank"
                )
            merged[layer] = values[:, :-1].to(self.dtype)
        return merged


def _place(args: Namespace, token: int, ranks: dict[str, int]) -> tuple[int, int, int, bool]:
    """Where ``token`` is: forward pass, position and sample in its rank's batch, whether that is this rank.

    A context-parallel rank holds two of the 2c parts of a sequence, one from each end.
    """
    samples, position = divmod(token, args.seq_length)
    samples, sample = divmod(samples, args.micro_batch_size)
    call, data_rank = divmod(samples, args.data_parallel_size)
    context, context_rank, tensor_rank = args.context_parallel_size, 0, 0
    if context > 1:
        length = args.seq_length // (2 * context)
        part, position = divmod(position, length)
        context_rank = min(part, 2 * context - 1 - part)
        position += (part >= context) * length
    if args.sequence_parallel:
        slice_length = args.seq_length // context // args.tensor_model_parallel_size
        tensor_rank, position = divmod(position, slice_length)
    is_own = (data_rank, context_rank, tensor_rank) == (ranks["dp"], ranks["cp"], ranks["tp"])
    return call, position, sample, is_own


@contextlib.contextmanager
def capture_router_input(model: Sequence[torch.nn.Module], sample: RouterInput) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` adds its tokens to ``sample``."""
    from megatron.core.utils import get_attr_wrapped_model

    with contextlib.ExitStack() as stack:
        for chunk in model:
            for layer in get_attr_wrapped_model(chunk, "decoder").layers:
                norm = _norm_inside(layer.mlp, layer.config)
                take = partial(sample.take, layer.layer_number - 1, norm)
                stack.callback(layer.mlp.register_forward_pre_hook(take).remove)
        yield


def _norm_inside(mlp: torch.nn.Module, config: Any) -> Any:
    """The norm that FC1 applies to its input, if Transformer Engine fuses it there; else the identity."""
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
