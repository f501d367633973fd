"""A dense checkpoint into a Mixture-of-Experts checkpoint, without building a model.

``plan`` looks at the dense checkpoint's metadata alone and decides; ``execute`` does what was decided,
one chunk in memory at a time. The experts are copies of the dense FFN (arXiv 2509.00679, eq. 3) and are
stored once; routers are made from attention heads and key statistics (eq. 4, 5) or drawn at random
(vanilla upcycling); all else is taken over as it is.

Symbols: L layers, n experts, m routers, c keys an expert, d' router width, H query heads, G query groups,
d head size, D hidden size, F FFN size.
"""

import math
from collections import Counter
from dataclasses import dataclass

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.layers import parse_layers, split_layers
from megatron_router_upcycling.checkpoint.names import (
    EXPERTS,
    EXTRA_STATE,
    FC1,
    FC2,
    FUSED_NORM,
    LAYERS,
    MODEL_STATE,
    QKV,
    SHARED_EXPERT,
    TRAINING_STATE,
    at_layer,
    other_norm,
    split_key,
)
from megatron_router_upcycling.checkpoint.publish.completeness import Target
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion import fine_grained
from megatron_router_upcycling.conversion.fine_grained import Cut
from megatron_router_upcycling.conversion.options import Options
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
    Step,
    WriteCommonState,
    accounted,
)
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.first_routers import router_parameters


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
        if (other := other_norm(key)) and other not in kept:
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
    added = tuple(key for key in model.extra_states(n, options.shared_expert, layers) if key not in kept)
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
