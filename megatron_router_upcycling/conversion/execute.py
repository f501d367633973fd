"""Carry out a plan: write the upcycled checkpoint chunk by chunk."""

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.names import at_layer, split_key
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion.fine_grained import SHARE, Cut
from megatron_router_upcycling.conversion.moe_arguments import moe_common_state
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.conversion.steps import (
    AddExtraStates,
    AlterExperts,
    CopyExperts,
    CopyNorm,
    CopyShared,
    Draw,
    Keep,
    LeaveOut,
    MakeRouters,
    WriteCommonState,
)
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation import random_weights
from megatron_router_upcycling.initialisation.ablations import alter_expert
from megatron_router_upcycling.initialisation.first_routers import router_values
from megatron_router_upcycling.key_statistics.file import KeyStats


def write_shards(
    dense: Checkpoint,
    key: str,
    target: str,
    shape: tuple[int, ...],
    front: int,
    cut: Cut,
    copies: bool,
    writer: CheckpointWriter,
    scratch: bytearray,
) -> None:
    """Write ``target`` of ``shape`` [L, n*G, ...], or without L where ``front`` is 0, of ``key`` [L, ...].

    Each shard is written once, or once a copy with ``copies``.
    """
    stored, num_experts = dense.tensors[key], shape[front]
    for chunk in stored.chunks:
        tensor = dense.read_chunk(chunk, stored.dtype, scratch)
        for shard, values, place in cut.shards(tensor, chunk.offsets, stored):
            offsets = [
                (*place[:front], expert, *place[front:])
                for expert in range(shard, num_experts, cut.granularity)
            ]
            writer.write_chunk(target, shape, values.unsqueeze(front).contiguous(), offsets, copies)


def write_scaled(
    dense: Checkpoint, key: str, target: str, writer: CheckpointWriter, scratch: bytearray
) -> None:
    """Write ``target``, which is ``key`` times ``SHARE``."""
    stored = dense.tensors[key]
    for chunk in stored.chunks:
        values = dense.read_chunk(chunk, stored.dtype, scratch) * SHARE
        writer.write_chunk(target, stored.shape, values, [chunk.offsets])


def execute(
    plan: Plan,
    dense: Checkpoint,
    model: DenseModel,
    options: Options,
    stats: KeyStats | None,
    writer: CheckpointWriter,
) -> None:
    """Carry out ``plan``, reading from ``dense`` and filling ``writer``."""
    scratch, source = bytearray(plan.scratch_bytes), plan.source
    for step in plan.steps:
        match step:
            case Keep(keys):
                for key in keys:
                    writer.take_over(source, key, key, copy=options.materialize)
            case CopyNorm(key, other):
                writer.take_over(source, key, other, copy=options.materialize)
            case CopyExperts(key, target, front=front, cut=cut) if cut:
                shape = step.shape(source.tensors[key].shape)
                copies = options.materialize
                write_shards(source, key, target, shape, front, cut, copies, writer, scratch)
            case CopyExperts():
                _copy_experts(source, step, options.materialize, writer)
            case CopyShared(key, target, scaled=True):
                write_scaled(source, key, target, writer, scratch)
            case CopyShared(key, target):
                writer.take_over(source, key, target, copy=options.materialize)
            case AlterExperts():
                _alter_experts(dense, step, model, options, scratch, writer)
            case Draw():
                _draw(step, source.tensors[step.like].dtype, model, options.seed, writer)
            case MakeRouters(parameters, layers):
                writer.next_file()
                chosen = layers or range(model.num_layers)
                file = (stats, options.key_stats) if stats and options.key_stats else None
                made = router_values(
                    dense, model, options.router, options.init, file, options.seed, scratch, chosen
                )
                for layer, values in zip(chosen, made, strict=True):
                    for (key, shape), value in zip(parameters, values, strict=True):
                        if not value.isfinite().all():
                            raise UserError(
                                f"--key-stats: too large for {model.dtype} in layer {layer} ({key})"
                            )
                        if layers is None:
                            writer.write_chunk(key, shape, value[None], [(layer, *(0 for _ in shape[1:]))])
                        else:
                            writer.write_chunk(at_layer(key, layer), shape[1:], value, [(0,) * value.dim()])
            case AddExtraStates(added=added):
                empty = writer.write_object(safe_pickle.dump_archive([None]))
                for key in added:
                    writer.add_object(key, empty)
            case WriteCommonState(made=made):
                common = moe_common_state(
                    dense.common, model, options.router, options.shared_expert, plan.layers
                )
                if made:
                    blob = writer.write_object(safe_pickle.dump_archive([common]))
                    writer.add_object(COMMON_STATE, blob)
                else:
                    writer.write_file(COMMON_FILE, safe_pickle.dump_archive(common))
            case LeaveOut():
                pass


def _copy_experts(source: Checkpoint, step: CopyExperts, copies: bool, writer: CheckpointWriter) -> None:
    stored, front = source.tensors[step.key], step.front
    shape = step.shape(stored.shape)
    for chunk in stored.chunks:
        sizes = (*chunk.sizes[:front], 1, *chunk.sizes[front:])
        offsets = [
            (*chunk.offsets[:front], expert, *chunk.offsets[front:]) for expert in range(step.num_experts)
        ]
        writer.store_chunk(source, chunk, stored.dtype, step.target, shape, sizes, offsets, copies)


def _alter_experts(
    dense: Checkpoint,
    step: AlterExperts,
    model: DenseModel,
    options: Options,
    scratch: bytearray,
    writer: CheckpointWriter,
) -> None:
    name, own = split_key(step.key)
    linear = name.split(".")[-2]
    for layer in range(model.num_layers) if own is None else (own,):
        weight = dense.read_layer(name, layer, scratch)
        shape = (step.num_experts, *weight.shape)
        for expert in range(step.num_experts):
            made = alter_expert(weight, linear, model.gated, options.init, options.seed, layer, expert)
            if step.front:
                place = (layer, expert, 0, 0)
                writer.write_chunk(step.target, (model.num_layers, *shape), made[None, None], [place])
            else:
                writer.write_chunk(step.target, shape, made[None], [(expert, 0, 0)])


def _draw(step: Draw, dtype: torch.dtype, model: DenseModel, seed: int, writer: CheckpointWriter) -> None:
    centered = bool(model.flags.get("apply_layernorm_1p"))
    mean, std = random_weights.first_values(step.key, model.init_method_std, model.num_layers, centered)
    name, layer = split_key(step.key)
    for block in random_weights.blocks(step.shape):
        # A layer's own tensor has the values that it has where the layers are stacked.
        place = block if layer is None else Box((layer, *block.offsets), (1, *block.sizes))
        values = random_weights.draw(seed, name, place, mean, std).view(block.sizes)
        writer.write_chunk(step.key, step.shape, values.to(dtype), [block.offsets])
