"""Convert between one key per layer and tensors stacked over layers.

Megatron stores ``decoder.layers.mlp.linear_fc2.weight`` [L, D, F] where all layers are alike. With
``moe_layer_freq`` or other options that make layers differ, it stores
``decoder.layers.0.mlp.linear_fc2.weight`` [D, F] and so on; with ``singleton_local_shards`` it also splits a
gated FC1 into ``weight_w`` (gate) and ``weight_v`` (up).
"""

import re
from collections.abc import Collection
from dataclasses import replace

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.format.metadata import Chunk, StoredTensor
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError

HALVES = re.compile(rf"({re.escape(names.within_layer(names.FC1))}\.(?:weight|bias))_[wv]")


def stack_layers(checkpoint: Checkpoint, with_experts: Collection[int] | None = None) -> Checkpoint:
    """Stack the tensors that ``checkpoint`` stores layer by layer on a new first axis; others are unchanged.

    ``with_experts``: the layers with experts; the others have a dense FFN. Each tensor is stacked over the
    layers that have it, in layer order. None: layers that differ are refused.
    """
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, dict[int, StoredTensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        if match := names.LAYER.fullmatch(key):
            layers.setdefault(match[2], {})[int(match[1])] = tensor
        else:
            tensors[key] = tensor
    count = max((max(found) + 1 for found in layers.values()), default=0)
    fused, separate = (f"{names.within_layer(name)}weight" for name in names.NORM_BEFORE_FFN)
    if with_experts is not None and fused in layers and separate in layers:  # with Transformer Engine
        layers[fused] = layers.pop(separate) | layers[fused]
    for key, found in _join_halves(layers).items():
        where = f"{checkpoint.root}: {key}"
        expected = _layers_of(f"{names.LAYERS}.{key}", count, with_experts)
        if sorted(found) != expected:
            there, asked = (", ".join(map(str, sorted(some))) or "none" for some in (found, expected))
            raise UserError(f"{where} is in layers {there} and should be in layers {asked}")
        tensors[f"{names.LAYERS}.{key}"] = _stack([found[layer] for layer in expected], where)
    objects = {names.stacked_state(key, count) or key: blob for key, blob in checkpoint.objects.items()}
    return replace(checkpoint, tensors=tensors, objects=objects)


def _layers_of(key: str, count: int, with_experts: Collection[int] | None) -> list[int]:
    """The layers that have ``key``."""
    if with_experts is None or not (
        names.is_ffn(key) or names.holds_experts([key]) or key.startswith(names.SHARED_EXPERT)
    ):
        return list(range(count))
    return [layer for layer in range(count) if (layer in with_experts) != names.is_ffn(key)]


def split_layers(checkpoint: Checkpoint) -> Checkpoint:
    """The inverse: give each layer of a stacked ``checkpoint`` its own keys; no chunk may span layers."""
    tensors: dict[str, StoredTensor] = {}
    for key, stored in checkpoint.tensors.items():
        if not names.is_of_layers(key):
            tensors[key] = stored
            continue
        layers: list[list[Chunk]] = [[] for _ in range(stored.shape[0])]
        for chunk in stored.chunks:
            if chunk.sizes[0] != 1:
                root = checkpoint.root
                raise UserError(f"{root}: stores several layers of {key} in one piece; leave --layers out")
            apart = Chunk(chunk.offsets[1:], chunk.sizes[1:], chunk.blob, chunk.stored_sizes)
            layers[chunk.offsets[0]].append(apart)
        for layer, chunks in enumerate(layers):
            tensors[names.at_layer(key, layer)] = StoredTensor(stored.shape[1:], stored.dtype, tuple(chunks))
    objects = {names.own_state(key) or key: blob for key, blob in checkpoint.objects.items()}
    return replace(checkpoint, tensors=tensors, objects=objects)


def _stack(layers: list[StoredTensor], where: str) -> StoredTensor:
    first = layers[0]
    if any((tensor.shape, tensor.dtype) != (first.shape, first.dtype) for tensor in layers):
        raise UserError(f"{where} is not of one shape and dtype in all layers, which convert needs")
    chunks = tuple(
        Chunk((layer, *chunk.offsets), (1, *chunk.sizes), chunk.blob, chunk.sizes)
        for layer, tensor in enumerate(layers)
        for chunk in tensor.chunks
    )
    return StoredTensor((len(layers), *first.shape), first.dtype, chunks)


def _join_halves(layers: dict[str, dict[int, StoredTensor]]) -> dict[str, dict[int, StoredTensor]]:
    """Gate and up projection as one parameter, gate first."""
    joined = {key: found for key, found in layers.items() if not HALVES.fullmatch(key)}
    for whole in sorted({match[1] for key in layers if (match := HALVES.fullmatch(key))}):
        gates, ups = (layers.get(f"{whole}_{half}", {}) for half in "wv")
        joined[whole] = {layer: _concatenate(gates[layer], ups[layer]) for layer in gates.keys() & ups.keys()}
    return joined


def _concatenate(gate: StoredTensor, up: StoredTensor) -> StoredTensor:
    rows, *columns = gate.shape
    moved = [replace(chunk, offsets=(rows + chunk.offsets[0], *chunk.offsets[1:])) for chunk in up.chunks]
    return StoredTensor((rows + up.shape[0], *columns), gate.dtype, (*gate.chunks, *moved))
