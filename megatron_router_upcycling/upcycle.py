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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling import fine_grained
from megatron_router_upcycling.checkpoint import safe_load
from megatron_router_upcycling.checkpoint.dense import FC1, FC2, QKV, DenseModel
from megatron_router_upcycling.checkpoint.ledger import Target
from megatron_router_upcycling.checkpoint.torch_dist import BACKEND, COMMON_FILE, COMMON_STATE, Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.fine_grained import SHARED_EXPERT, Cut
from megatron_router_upcycling.key_stats import KeyStats
from megatron_router_upcycling.qkv import split_qkv
from megatron_router_upcycling.router_config import RouterConfig
from megatron_router_upcycling.router_init import init_mixture

LAYERS = "decoder.layers"
ROUTER = f"{LAYERS}.mlp.router"
EXPERTS = f"{LAYERS}.mlp.experts.experts"
EXTRA_STATE = "._extra_state/"
FUSED_NORM = f"{FC1}.layer_norm_"  # the norm before the FFN in a dense layer, and in an MoE layer built
SEPARATE_NORM = f"{LAYERS}.pre_mlp_layernorm."  # without Transformer Engine; with it, this is its name

# What a fresh run makes anew, whoever saved it: left out.
TRAINING_STATE = re.compile(
    r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|dataloader_state"
)
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


# Steps. Each names the tensors or objects of the dense checkpoint that it accounts for.


@dataclass(frozen=True)
class Keep:
    """Take tensors and objects over under their own names, their bytes untouched."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class CopyNorm:
    """Give a norm before the FFN its other name as well."""

    key: str
    other: str


@dataclass(frozen=True)
class CopyExperts:
    """Make ``target`` [L, n, ...] of n copies of ``key`` [L, ...], or of shards of copies."""

    key: str
    target: str
    num_experts: int
    cut: Cut | None


@dataclass(frozen=True)
class CopyShared:
    """Make a parameter of the shared expert, FC1 as it is and FC2 scaled."""

    key: str
    target: str
    scaled: bool


@dataclass(frozen=True)
class MakeRouters:
    """Make the routers' parameters: key -> shape over all layers."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class AddExtraStates:
    """Write the empty entries that modules of an MoE layer look for; ``keys`` go: those of the dense FFN,
    and those that only a torch_dist checkpoint can hand on."""

    keys: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class WriteCommonState:
    """Write the common state of a fresh MoE run; the dense run's goes. ``made``: none where it is a file."""

    keys: tuple[str, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class LeaveOut:
    """Training state that the MoE run does not go on from."""

    keys: tuple[str, ...]


Step = Keep | CopyNorm | CopyExperts | CopyShared | MakeRouters | AddExtraStates | WriteCommonState | LeaveOut


@dataclass(frozen=True)
class Plan:
    """The steps, and what carrying them out writes."""

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
    objects = tuple(dense.objects)
    left_out = tuple(key for key in (*dense.tensors, *objects) if TRAINING_STATE.match(key))
    ffn = [key for key in dense.tensors if key.startswith((f"{FC1}.", f"{FC2}.")) and FUSED_NORM not in key]
    ffn_states = tuple(
        key
        for key in objects
        if key.startswith((f"{FC1}{EXTRA_STATE}", f"{FC2}{EXTRA_STATE}"))
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
    steps += [CopyNorm(key, other) for key in kept if (other := _other_norm(key)) and other not in kept]
    for key in ffn:
        cut = Cut.of(key, model, G) if G > 1 else None
        steps.append(CopyExperts(key, EXPERTS + key.removeprefix(f"{LAYERS}.mlp"), n, cut))
    shared = [
        CopyShared(key, SHARED_EXPERT + key.removeprefix(f"{LAYERS}.mlp"), key.startswith(FC2))
        for key in ffn * options.shared_expert
    ]
    steps += shared
    routers = MakeRouters(router_parameters(model, options.router))
    added = tuple(key for key in extra_states(model, n, options.shared_expert) if key not in kept)
    steps += [routers, AddExtraStates(ffn_states, added), WriteCommonState(common, made), LeaveOut(left_out)]

    copies = options.router.num_copies if options.materialize else 1
    read = [key for key in ffn if G > 1] + [step.key for step in shared if step.scaled]
    elements = sum(math.prod(shape) for _, shape in routers.parameters)
    result = Plan(
        steps=tuple(steps),
        kept_bytes=sum(dense.stored_bytes(key) for key in kept),
        changed_bytes=sum(dense.stored_bytes(key) for key in kept if not dense.is_verbatim(key)),
        expert_bytes=copies * sum(dense.stored_bytes(key) for key in ffn)
        + sum(dense.stored_bytes(step.key) for step in shared),
        router_bytes=elements * model.dtype.itemsize,
        scratch_bytes=max(map(dense.largest_chunk, [QKV, *read])),
    )
    _check_accounts(result, dense)
    return result


def accounted(step: Step) -> tuple[str, ...]:
    """The entries of the dense checkpoint that ``step`` accounts for."""
    match step:
        case CopyExperts(key=key):
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


def targets(plan: Plan, dense: Checkpoint, model: DenseModel) -> dict[str, Target]:
    """Every entry that carrying out ``plan`` makes: shape and dtype of a tensor, None of an object."""
    made: dict[str, Target] = {}

    def like(key: str, name: str) -> None:
        stored = dense.tensors.get(key)
        made[name] = stored and (stored.shape, stored.dtype)

    for step in plan.steps:
        match step:
            case Keep(keys):
                for key in keys:
                    like(key, key)
            case CopyNorm(key, other):
                like(key, other)
            case CopyExperts(key, target, num_experts, cut):
                stored = dense.tensors[key]
                shape = cut.shape(stored.shape) if cut else stored.shape
                made[target] = (shape[0], num_experts, *shape[1:]), stored.dtype
            case CopyShared(key, target):
                like(key, target)
            case MakeRouters(parameters):
                made |= {key: (shape, model.dtype) for key, shape in parameters}
            case AddExtraStates(added=keys) | WriteCommonState(made=keys):
                made |= dict.fromkeys(keys)
    return made


def _other_norm(key: str) -> str | None:
    if key.startswith(FUSED_NORM):
        return SEPARATE_NORM + key.removeprefix(FUSED_NORM)
    if key.startswith(SEPARATE_NORM) and EXTRA_STATE not in key:
        return FUSED_NORM + key.removeprefix(SEPARATE_NORM)
    return None


def router_parameters(model: DenseModel, router: RouterConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Global keys and shapes of the routers' parameters.

    Megatron gives a router a bias where linear layers have one.
    """
    L, D, n = model.num_layers, model.hidden_size, router.num_experts
    bias = () if model.flags["disable_bias_linear"] else ((f"{ROUTER}.bias", (L, n)),)
    if router.router == "linear":
        return (f"{ROUTER}.weight", (L, n, D)), *bias
    shape = router.shape(model.num_attention_heads, model.kv_channels)
    return (
        (f"{ROUTER}.query_weight", (L, shape.num_routers, shape.router_width, D)),
        (f"{ROUTER}.expert_key", (L, n * shape.keys_per_expert, shape.router_width)),
        *bias,
    )


def extra_states(model: DenseModel, num_experts: int, shared_expert: bool = False) -> list[str]:
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
        keys += [f"{LAYERS}.{module}{EXTRA_STATE}shard_{layer}_{L}" for module in modules]
        for linear in ("linear_fc1", "linear_fc2"):
            keys += [f"{SHARED_EXPERT}.{linear}{EXTRA_STATE}shard_{layer}_{L}"] * shared_expert
            prefix = f"{EXPERTS}.{linear}{EXTRA_STATE}shard_{layer}."
            keys += [f"{prefix}{expert}_{L}.{num_experts}" for expert in range(num_experts)]
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
    scratch = bytearray(plan.scratch_bytes)
    for step in plan.steps:
        match step:
            case Keep(keys):
                for key in keys:
                    writer.take_over(dense, key, key, copy=options.materialize)
            case CopyNorm(key, other):
                writer.take_over(dense, key, other, copy=options.materialize)
            case CopyExperts(key, target, num_experts, cut) if cut:
                copies = options.materialize
                fine_grained.write_shards(dense, key, target, cut, num_experts, copies, writer, scratch)
            case CopyExperts(key, target, num_experts):
                _copy_experts(dense, key, target, num_experts, options.materialize, writer)
            case CopyShared(key, target, scaled=True):
                fine_grained.write_scaled(dense, key, target, writer, scratch)
            case CopyShared(key, target):
                writer.take_over(dense, key, target, copy=options.materialize)
            case MakeRouters(parameters):
                writer.next_file()
                for layer, values in enumerate(router_values(dense, model, options, stats, scratch)):
                    for (key, shape), value in zip(parameters, values, strict=True):
                        offset = (layer, *(0 for _ in shape[1:]))
                        writer.write_chunk(key, shape, value[None], [offset])
            case AddExtraStates(added=added):
                empty = writer.write_object(safe_load.dump_archive([None]))
                for key in added:
                    writer.add_object(key, empty)
            case WriteCommonState(made=made):
                common = moe_common_state(dense.common, model, options)
                if made:
                    blob = writer.write_object(safe_load.dump_archive([common]))
                    writer.add_object(COMMON_STATE, blob)
                else:
                    writer.write_file(COMMON_FILE, safe_load.dump_archive(common))
            case LeaveOut():
                pass


def _copy_experts(
    dense: Checkpoint, key: str, target: str, num_experts: int, copies: bool, writer: CheckpointWriter
) -> None:
    stored = dense.tensors[key]
    shape = (stored.shape[0], num_experts, *stored.shape[1:])
    for chunk in stored.chunks:
        sizes = (chunk.sizes[0], 1, *chunk.sizes[1:])  # [layers, 1, ...]
        offsets = [(chunk.offsets[0], expert, *chunk.offsets[1:]) for expert in range(num_experts)]
        writer.store_chunk(dense, chunk, stored.dtype, target, shape, sizes, offsets, copies)


def router_values(
    dense: Checkpoint, model: DenseModel, options: Options, stats: KeyStats | None, scratch: bytearray
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each layer's router parameters, in the order of ``router_parameters`` and the model's dtype.

    A linear router is drawn layer after layer from one generator seeded with ``options.seed``. A bias is
    zero: the paper's routers have none.
    """
    bias = () if model.flags["disable_bias_linear"] else (torch.zeros(options.router.num_experts),)
    if options.router.router == "linear":
        generator = torch.Generator().manual_seed(options.seed)
        for _ in range(model.num_layers):
            weight = torch.empty(options.router.num_copies, model.hidden_size)
            weight.normal_(std=model.init_method_std, generator=generator)
            weight = weight.repeat_interleave(options.router.granularity, dim=0)
            yield tuple(value.to(model.dtype) for value in (weight, *bias))
        return
    assert stats is not None
    H, G, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    for layer in range(model.num_layers):
        query, _, _ = split_qkv(dense.read_layer(QKV, layer, scratch), H, G)
        key_heads = stats.mean[layer].repeat_interleave(H // G, dim=0)  # [G, d] -> [H, d]
        query_weight, expert_key = init_mixture(query.unflatten(0, (H, d)), key_heads, options.router)
        yield tuple(value.to(model.dtype) for value in (query_weight, expert_key, *bias))


def model_flags(model: DenseModel, options: Options) -> dict[str, Any]:
    """Megatron flags of the MoE's architecture, beside the dense model's and what the router gives."""
    flags = fine_grained.moe_arguments(model, options.router.granularity, options.shared_expert)
    if options.router.granularity == 1:
        del flags["moe_ffn_hidden_size"]  # Megatron's own default
    return {flag: value for flag, value in flags.items() if value is not None}


# Megatron's arguments of a fresh MoE run, beside those that the router gives.
FRESH = {
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "iteration": 0,
    "curr_iteration": 0,
    "ckpt_format": BACKEND,
    "num_floating_point_operations_so_far": 0,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": None,
}
# Which experts to build is the business of the machine that trains: --use-checkpoint-args must not say.
DECIDED_LATER = ("moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias")


def moe_common_state(common: dict[str, Any], model: DenseModel, options: Options) -> dict[str, Any]:
    """The common state of an MoE that has not trained yet.

    Megatron takes architecture (``--use-checkpoint-args``) and the place in the data from the arguments
    in it; optimizer, schedule and random state start anew.
    """
    router = options.router
    values = vars(common["args"]) | FRESH
    values |= fine_grained.moe_arguments(model, router.granularity, options.shared_expert)
    values |= {
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_pre_softmax": router.pre_softmax,
    }
    kept = {name: common[name] for name in ("checkpoint_version", "content_metadata") if name in common}
    args = safe_load.namespace({name: value for name, value in values.items() if name not in DECIDED_LATER})
    return kept | {"args": args, "iteration": 0, "num_floating_point_operations_so_far": 0}
