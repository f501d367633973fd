"""A dense checkpoint into a Mixture-of-Experts checkpoint, without building a model.

``plan`` looks at the dense checkpoint's metadata alone and decides; ``execute`` does what was decided,
one chunk in memory at a time. The experts are copies of the dense FFN (arXiv 2509.00679, eq. 3) and are
stored once; routers are made from attention heads and key statistics (eq. 4, 5) or drawn at random
(vanilla upcycling); all else is taken over as it is.

Symbols: L layers, n experts, m routers, c keys an expert, d' router width, H query heads, G query groups,
d head size, D hidden size, F FFN size.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_router_upcycling import fine_grained, random_weights
from megatron_router_upcycling.altered_start import alter_expert
from megatron_router_upcycling.checkpoint import safe_load
from megatron_router_upcycling.checkpoint.dense import FC1, FC2, QKV, DenseModel
from megatron_router_upcycling.checkpoint.layers import at_layer, parse_layers, split_key, split_layers
from megatron_router_upcycling.checkpoint.ledger import Target
from megatron_router_upcycling.checkpoint.torch_dist import COMMON_FILE, COMMON_STATE, Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.fine_grained import SHARED_EXPERT, Cut
from megatron_router_upcycling.init_config import InitConfig
from megatron_router_upcycling.initial_routers import router_parameters, router_values
from megatron_router_upcycling.key_stats import KeyStats
from megatron_router_upcycling.moe_arguments import moe_common_state
from megatron_router_upcycling.router_config import RouterConfig
from megatron_router_upcycling.upcycle_steps import (
    AddExtraStates,
    AlterExperts,
    CopyExperts,
    CopyNorm,
    CopyShared,
    Draw,
    Keep,
    LeaveOut,
    MakeRouters,
    Step,
    WriteCommonState,
)

LAYERS = "decoder.layers"
EXPERTS = f"{LAYERS}.mlp.experts.experts"
EXTRA_STATE = "._extra_state/"
FUSED_NORM = f"{FC1}.layer_norm_"  # the norm before the FFN in a dense layer, and in an MoE layer built
SEPARATE_NORM = f"{LAYERS}.pre_mlp_layernorm."  # without Transformer Engine; with it, this is its name

# What a fresh run makes anew, whoever saved it, and why it is left out.
LEFT_OUT = {
    "optimizer": "of the dense model's parameters; the Mixture-of-Experts starts with a fresh one",
    "rng_state": "of the dense run's ranks; a fresh run seeds its own",
    "rerun_state_machine_state": "of the dense run; it says nothing of the model",
    "dataloader_state": "of the dense run; a fresh run begins at the beginning of its data",
}
TRAINING_STATE = re.compile(rf"(chained_\d+\.)?(?P<kind>{'|'.join(LEFT_OUT)})\b")
MODEL_STATE = re.compile(r"embedding\.|decoder\.|output_layer\.")


@dataclass(frozen=True)
class Options:
    """What the user asks for, beside the two folders."""

    router: RouterConfig
    key_stats: Path | None = None
    seed: int = 1234
    materialize: bool = False
    overwrite: bool = False
    shared_expert: bool = False
    layers: str | None = None  # those that get experts, as ``parse_layers`` reads them; None: all
    init: InitConfig = InitConfig()
    key_source: str | None = None  # that the key statistics must be of


@dataclass(frozen=True)
class Plan:
    """The steps, and what carrying them out writes."""

    source: Checkpoint  # the dense one, its layers apart where the MoE's are
    layers: tuple[int, ...] | None  # those that get experts; None: all
    steps: tuple[Step, ...]
    kept_bytes: int  # of what is taken over: linked, or copied where no link can be made
    changed_bytes: int  # of these, what can never be linked: a torch_dist checkpoint stores it differently
    expert_bytes: int
    router_bytes: int
    scratch_bytes: int  # the largest chunk that something is made from


def plan(dense: Checkpoint, model: DenseModel, options: Options) -> Plan:
    """Decide what becomes of every entry of ``dense``.

    Raises:
        UserError: it holds an entry that has no place in an MoE checkpoint, or sizes do not fit.
    """
    n, G = options.router.num_experts, options.router.granularity
    fine_grained.check(dense, model, G, options.shared_expert)
    layers = None if options.layers is None else parse_layers(options.layers, model.num_layers)
    dense, front = (dense, 1) if layers is None else (split_layers(dense), 0)

    def gets_experts(key: str) -> bool:
        return layers is None or split_key(key)[1] in layers

    def named(key: str) -> str:
        return split_key(key)[0]

    objects = tuple(dense.objects)
    left_out = tuple(key for key in (*dense.tensors, *objects) if TRAINING_STATE.match(key))
    ffn = [
        key
        for key in dense.tensors
        if named(key).startswith((f"{FC1}.", f"{FC2}."))
        and FUSED_NORM not in named(key)
        and gets_experts(key)
    ]
    ffn_states = tuple(
        key
        for key in objects
        if (named(key).startswith((f"{FC1}{EXTRA_STATE}", f"{FC2}{EXTRA_STATE}")) and gets_experts(key))
        or (EXTRA_STATE in key and not dense.is_verbatim(key))
    )
    common = tuple(key for key in objects if key == COMMON_STATE)
    made = () if (dense.iteration_dir / COMMON_FILE).is_file() else (COMMON_STATE,)
    gone = {*left_out, *ffn, *ffn_states, *common}
    kept = tuple(key for key in (*dense.tensors, *objects) if key not in gone)
    for key in kept:
        if not MODEL_STATE.match(key):
            raise UserError(f"DENSE {dense.root}: holds {key}, which convert does not know what to make of")

    steps: list[Step] = [Keep(kept)]
    for key in filter(gets_experts, kept):
        if (other := _other_norm(key)) and other not in kept:
            steps.append(CopyNorm(key, other))
    shared: list[CopyShared] = []
    for key in ffn:
        name, layer = split_key(key)
        parameter = name.removeprefix(f"{LAYERS}.mlp")
        cut = Cut.of(name, model, G, front) if G > 1 else None
        target = at_layer(EXPERTS + parameter, layer)
        if options.init.alters_experts and name.endswith(".weight"):
            steps.append(AlterExperts(key, target, n, front))
        else:
            steps.append(CopyExperts(key, target, n, front, cut))
        if options.shared_expert:
            shared.append(CopyShared(key, at_layer(SHARED_EXPERT + parameter, layer), name.startswith(FC2)))
    steps += shared
    if options.init.weights == "random":
        steps = [drawn for step in steps for drawn in _from_scratch(step, dense)]
    routers = MakeRouters(router_parameters(model, options.router), layers)
    added = tuple(key for key in extra_states(model, n, options.shared_expert, layers) if key not in kept)
    steps += [routers, AddExtraStates(ffn_states, added), WriteCommonState(common, made), LeaveOut(left_out)]

    copies = options.router.num_copies if options.materialize or options.init.alters_experts else 1
    read = [key for key in ffn if G > 1 or options.init.alters_experts] + [
        step.key for step in shared if step.scaled
    ]
    elements = sum(math.prod(shape) for shape in routers.made().values())
    result = Plan(
        source=dense,
        layers=layers,
        steps=tuple(steps),
        kept_bytes=sum(dense.stored_bytes(key) for key in kept),
        changed_bytes=sum(dense.stored_bytes(key) for key in kept if not dense.is_verbatim(key)),
        expert_bytes=copies * sum(dense.stored_bytes(key) for key in ffn)
        + sum(dense.stored_bytes(step.key) for step in shared),
        router_bytes=elements * model.dtype.itemsize,
        scratch_bytes=max(map(dense.largest_chunk, [at_layer(QKV, None if front else 0), *read])),
    )
    _check_accounts(result, dense)
    return result


def _from_scratch(step: Step, dense: Checkpoint) -> list[Step]:
    """``step`` with its values drawn in place of the dense model's."""
    match step:
        case Keep(keys):
            tensors = [key for key in keys if key in dense.tensors]
            kept = Keep(tuple(key for key in keys if key not in dense.tensors))
            return [kept, *(Draw(key, dense.tensors[key].shape, key, goes=True) for key in tensors)]
        case CopyNorm(key, other):
            return [Draw(other, dense.tensors[key].shape, key, goes=False)]
        case CopyExperts(key, target):
            return [Draw(target, step.shape(dense.tensors[key].shape), key, goes=True)]
        case CopyShared(key, target):
            return [Draw(target, dense.tensors[key].shape, key, goes=False)]
        case _:
            return [step]


def accounted(step: Step) -> tuple[str, ...]:
    """The entries of the dense checkpoint that ``step`` accounts for."""
    match step:
        case CopyExperts(key=key) | AlterExperts(key=key) | Draw(like=key, goes=True):
            return (key,)
        case Keep(keys=keys) | AddExtraStates(keys=keys) | WriteCommonState(keys=keys) | LeaveOut(keys=keys):
            return keys
        case _:
            return ()


def _check_accounts(plan: Plan, dense: Checkpoint) -> None:
    """Every entry of the dense checkpoint is accounted for exactly once."""
    accounts = Counter(key for step in plan.steps for key in accounted(step))
    accounts.subtract((*dense.tensors, *dense.objects))
    for key, count in accounts.items():
        if count:
            raise UserError(f"DENSE {dense.root}: {key} would be {'used twice' if count > 0 else 'lost'}")


def targets(plan: Plan, model: DenseModel) -> dict[str, Target]:
    """Every entry that carrying out ``plan`` makes: shape and dtype of a tensor, None of an object."""
    made: dict[str, Target] = {}

    def like(key: str, name: str) -> None:
        stored = plan.source.tensors.get(key)
        made[name] = (stored.shape, stored.dtype) if stored else None

    for step in plan.steps:
        match step:
            case Keep(keys):
                for key in keys:
                    like(key, key)
            case CopyNorm(key, other):
                like(key, other)
            case CopyExperts(key, target):
                stored = plan.source.tensors[key]
                made[target] = step.shape(stored.shape), stored.dtype
            case AlterExperts(key, target, n, front):
                stored = plan.source.tensors[key]
                made[target] = (*stored.shape[:front], n, *stored.shape[front:]), stored.dtype
            case CopyShared(key, target):
                like(key, target)
            case Draw(key, shape, source):
                made[key] = shape, plan.source.tensors[source].dtype
            case MakeRouters():
                made |= {key: (shape, model.dtype) for key, shape in step.made().items()}
            case AddExtraStates(added=keys) | WriteCommonState(made=keys):
                made |= dict.fromkeys(keys)
    return made


def _other_norm(key: str) -> str | None:
    name, layer = split_key(key)
    if name.startswith(FUSED_NORM):
        return at_layer(SEPARATE_NORM + name.removeprefix(FUSED_NORM), layer)
    if name.startswith(SEPARATE_NORM) and EXTRA_STATE not in name:
        return at_layer(FUSED_NORM + name.removeprefix(SEPARATE_NORM), layer)
    return None


def extra_states(
    model: DenseModel, num_experts: int, shared_expert: bool = False, layers: tuple[int, ...] | None = None
) -> list[str]:
    """Keys of the extra states that an MoE with or without Transformer Engine looks for.

    Megatron stops where one is missing, and ignores those that it does not look for.
    """
    L = model.num_layers
    modules = ["pre_mlp_layernorm", "self_attention.core_attention"]
    modules += ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] * bool(
        model.flags.get("qk_layernorm")
    )
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(L):
        own = None if layers is None else layer
        place = f"{layer}_{L}" if layers is None else "0_1"
        keys += [at_layer(f"{LAYERS}.{module}{EXTRA_STATE}shard_{place}", own) for module in modules]
        for linear in ("linear_fc1", "linear_fc2"):
            if layers is not None and layer not in layers:
                keys.append(at_layer(f"{LAYERS}.mlp.{linear}{EXTRA_STATE}shard_0_1", own))
                continue
            keys += [at_layer(f"{SHARED_EXPERT}.{linear}{EXTRA_STATE}shard_{place}", own)] * shared_expert
            for expert in range(num_experts):
                place_of_expert = (
                    f"{layer}.{expert}_{L}.{num_experts}" if own is None else f"{expert}_{num_experts}"
                )
                keys.append(at_layer(f"{EXPERTS}.{linear}{EXTRA_STATE}shard_{place_of_expert}", own))
    return keys


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
                fine_grained.write_shards(source, key, target, shape, front, cut, copies, writer, scratch)
            case CopyExperts():
                _copy_experts(source, step, options.materialize, writer)
            case CopyShared(key, target, scaled=True):
                fine_grained.write_scaled(source, key, target, writer, scratch)
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
                empty = writer.write_object(safe_load.dump_archive([None]))
                for key in added:
                    writer.add_object(key, empty)
            case WriteCommonState(made=made):
                common = moe_common_state(
                    dense.common, model, options.router, options.shared_expert, plan.layers
                )
                if made:
                    blob = writer.write_object(safe_load.dump_archive([common]))
                    writer.add_object(COMMON_STATE, blob)
                else:
                    writer.write_file(COMMON_FILE, safe_load.dump_archive(common))
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
    for offsets, sizes in random_weights.blocks(step.shape):
        place = offsets if layer is None else (layer, *offsets)  # as if the layers were stacked
        values = random_weights.draw(seed, name, place, sizes, mean, std)
        writer.write_chunk(step.key, step.shape, values.to(dtype), [offsets])
