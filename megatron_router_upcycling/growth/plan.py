"""More experts of a trained Mixture-of-Experts: n become r*n, each the same bytes under several numbers.

Expert Upcycling (arXiv 2604.19835). Expert j*n + e is copy j of expert e. Nothing of the experts is read or
written: chunks are named again. A router gets a row for each copy: the expert's own with a little noise,
without which copies would stay equal. Everything else is taken over.

With equal rows the copies of an expert are twins: the k chosen experts are the twins of the best k/r, and the
function changes. Two ways keep it:

- k*r experts a token (``top_k``): all twins of the k experts, each with 1/r of the weight.
- ``keep_function``: Megatron's group-limited routing with a group a copy. A token chooses one group, and k
  experts in it. The noise is then one vector a copy, the same for all of its experts: it moves all logits of
  a group alike, which changes neither the k experts nor, with softmax after top-k, their weights, and decides
  which copy a token goes to.

Symbols: L layers, n experts before, r copies, D hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE, locate
from megatron_router_upcycling.checkpoint.format.metadata import StoredTensor
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.publish.checks import Stamps
from megatron_router_upcycling.checkpoint.read_model import model_of
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.convert import Conversion
from megatron_router_upcycling.conversion.moe_arguments import recorded_flags
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.conversion.steps import Take, WriteStates
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.growth.steps import Copies, RepeatExperts, RepeatRows
from megatron_router_upcycling.routers.config import Recorded, RouterConfig
from megatron_router_upcycling.routers.kinds import all_parameters, keys_per_expert
from megatron_router_upcycling.training.run_log import files as run_log

ROUTER_NOISE = 0.3  # of six values, that of the lowest loss at the first step (docs/comparison.md)
LITTLE_NOISE = 0.01  # with softmax before top-k, a copy's weights move with it
MOST_EXPERTS = 10_000
LINES_OF_LOAD = 10  # of routing.jsonl, the last ones, whose mean is an expert's load
GROUPS = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor")


@dataclass(frozen=True)
class MoreExperts(Recorded):
    """The options. ``top_k``: None keeps it; ``router_noise``: over the root mean square of a row."""

    num_experts: int = 0
    top_k: int | None = None
    duplicate: str = "even"
    router_noise: float | None = None
    keep_function: bool = False
    copies: tuple | None = None  # type: ignore[type-arg]  # ``Copies`` by load, as the manifest records them

    def noise(self, router: RouterConfig) -> float:
        """The noise asked for, or the default."""
        if self.router_noise is not None:
            return self.router_noise
        return LITTLE_NOISE if self.keep_function and router.pre_softmax else ROUTER_NOISE

    def first_step(self, top_k: int, pre_softmax: bool) -> str:
        """What the model is before training, in words."""
        if self.keep_function:
            small = " but for the noise" * (pre_softmax and bool(self.router_noise))
            return f"it is the model it was made of{small}: a token's experts are all of one copy"
        if self.top_k:
            return f"a token goes to {top_k} experts, the copies of those that it went to among them"
        return (
            "the loss is above that of the model it was made of: copies of one expert are chosen together, so"
            f" that a token's {top_k} experts are fewer different ones (--keep-function avoids it)"
        )

    @classmethod
    def recorded(cls, values: Any, source: Path) -> Self:
        """From a manifest's section."""
        if isinstance(values, dict) and isinstance(rows := values.get("copies"), list):
            copies = tuple(tuple(row) if isinstance(row, list) else () for row in rows)
            values = values | {"copies": copies}
        return cls.from_dict(values, f"{source}: more_experts")


class Growth(Plan):
    """The plan of a conversion that only adds experts."""

    def values_taken_over(self) -> Iterator[tuple[Checkpoint, str]]:
        """The routers' parameters; the experts' values are not read (``verify`` reads them)."""
        for step in self.steps:
            if isinstance(step, RepeatRows):
                yield self.source, step.key


def prepare(
    root: str | Path, out: str | Path, more: MoreExperts, overwrite: bool = False, **options: Any
) -> Conversion:
    """Read and check everything, as ``convert.prepare``; ``options``: ``seed`` and ``materialize``."""
    out, folder = Path(out), locate(Path(root))[1]
    stamps = Stamps([*folder.rglob("*"), folder.parent / run_log.ROUTING])
    moe = open_checkpoint(root)
    publish.check_target(out, moe.root, overwrite, source_name="MOE", made_by=names.TRACKER)
    conversion = Conversion(plan(moe, more, overwrite=overwrite, **options), None, out, stamps)
    publish.check_space(out, conversion.bytes_to_write)
    return conversion


def plan(moe: Checkpoint, more: MoreExperts, **options: Any) -> Growth:
    """Decide what becomes of every entry of ``moe``; ``options``: seed, materialize and overwrite."""
    record = manifest.read(moe.root)
    router = manifest.router_of(record, moe.args, moe.root)
    experts = [key for key in moe.tensors if _is_expert(key)]
    if not experts:
        raise UserError(
            f"MOE {moe.root}: its experts are not stored as {names.EXPERTS}; save it with Megatron 0.19"
        )
    model = model_of(moe, moe.tensors[experts[0]].dtype)
    _check(moe, router, more)
    layers = tuple(sorted({layer for key in experts if (layer := names.split_key(key)[1]) is not None}))
    copies = more.copies or _copies(moe.root, router, more, len(layers) or model.num_layers)
    _check_copies(moe, router, more, copies, len(layers) or model.num_layers)
    noise = more.noise(router)
    more = replace(more, router_noise=noise, copies=copies if more.duplicate == "load" else None)
    repeats, rows = _repeats(moe, model, router, more, layers, copies)

    keys = (*moe.tensors, *moe.objects)
    left_out = tuple(key for key in keys if names.TRAINING_STATE.match(key))
    gone = {*left_out, COMMON_STATE, *filter(_is_expert, keys), *(step.key for step in rows)}
    kept = tuple(key for key in keys if key not in gone)
    shared = any(names.split_key(key)[0].startswith(names.SHARED_EXPERT) for key in moe.tensors)
    states = names.extra_states(model.num_layers, more.num_experts, model.qk_norm, shared, layers or None)
    common_as_file = (moe.iteration_dir / COMMON_FILE).is_file()
    write_states = WriteStates(tuple(key for key in states if key not in kept), common_as_file)

    grown = replace(router, num_experts=more.num_experts, top_k=more.top_k or router.top_k)
    routed = _routing(moe.args, router, grown, more.keep_function)
    init, times = manifest.init_config(record or {}, moe.root), more.num_experts / router.num_experts
    made = Options(router=grown, init=init, shared_expert=shared, **options)
    return Growth(
        dense=moe,
        source=moe,
        model=model,
        options=made,
        arguments=routed,
        layers=layers or None,
        flags=_flags(moe.args, model, record) | {flag: routed[flag] for flag in GROUPS if flag in routed},
        steps=(Take({key: key for key in kept}, "untouched"), *repeats, *rows, write_states),
        kept=kept,
        left_out=left_out,
        kept_bytes=sum(map(moe.stored_bytes, (*kept, *experts))),
        changed_bytes=sum(moe.stored_bytes(key) for key in kept if not moe.is_verbatim(key)),
        expert_bytes=int(times * sum(map(moe.stored_bytes, experts)))
        if made.materialize
        else sum(moe.stored_bytes(key) for key in experts if not _is_apart(moe.tensors[key], key)),
        router_bytes=int(times * sum(moe.stored_bytes(step.key) for step in rows)),
        scratch_bytes=0,
        first_step=f"{more.first_step(grown.top_k, grown.pre_softmax)}; the optimizer starts afresh",
        record={"more_experts": asdict(more)},
    )


def _repeats(
    moe: Checkpoint,
    model: DenseModel,
    router: RouterConfig,
    more: MoreExperts,
    layers: tuple[int, ...],
    copies: Copies,
) -> tuple[list[RepeatExperts], list[RepeatRows]]:
    """The steps that make the experts, and the routers; ``layers``: those with experts, () if all have."""
    own = {layer: (row,) for layer, row in zip(layers, copies, strict=False)}
    parameters = all_parameters(router, model, model.linear_bias)
    rows_of = {f"{names.ROUTER}.{one.name}" for one in parameters if one.per_expert}
    noise = {f"{names.ROUTER}.{router.kind.scaled}": more.router_noise or 0.0}
    experts, rows = [], []
    for key, stored in moe.tensors.items():
        name, layer = names.split_key(key)
        if not _is_expert(key) and name not in (*rows_of, *names.BALANCING):
            continue
        sizes = [model.num_layers, router.num_experts][layer is not None :]
        if list(stored.shape[: len(sizes)]) != sizes or (layer is None) == bool(layers):
            found = f"{key} is {list(stored.shape)}"
            raise UserError(f"MOE {moe.root}: {found}, and its arguments ask for {sizes} in front")
        of_key = copies if layer is None else own[layer]
        if _is_expert(key):
            experts.append(RepeatExperts(key, of_key))
        else:
            rows.append(RepeatRows(key, of_key, noise.get(name, 0.0), more.keep_function))
    return experts, rows


def _is_expert(key: str) -> bool:
    return names.split_key(key)[0].startswith(f"{names.EXPERTS}.")


def _is_apart(stored: StoredTensor, key: str) -> bool:
    """Whether each chunk belongs to one expert of one layer, so that it can be named again."""
    axes = range(1 + (names.split_key(key)[1] is None))  # layers and experts, or experts
    return all(chunk.stored is None and chunk.sizes[axis] == 1 for chunk in stored.chunks for axis in axes)


def _check_copies(
    moe: Checkpoint, router: RouterConfig, more: MoreExperts, copies: Copies, num_layers: int
) -> None:
    """Refuse copies, as a manifest records them, that are of another model."""
    fits = len(copies) == num_layers
    for row in copies:
        sound = all(type(one) is int and 0 <= one < router.num_experts for one in row)
        fits = fits and sound and len(row) == more.num_experts
    if not fits:
        raise UserError(f"{moe.root}: the recorded copies of its experts do not fit; convert it again")


def _check(moe: Checkpoint, router: RouterConfig, more: MoreExperts) -> None:
    n, N, root = router.num_experts, more.num_experts, moe.root
    if not n < N <= MOST_EXPERTS or (more.duplicate == "even" and N % n):
        multiple = f" that is a multiple of {n}" if more.duplicate == "even" else ""
        raise UserError(
            f"--num-experts {N}: MOE {root} has {n} experts; give a larger number{multiple}"
            f", and at most {MOST_EXPERTS}"
        )
    if not 0 <= more.noise(router) < math.inf:
        raise UserError(f"--router-noise {more.router_noise}: must be 0 or more")
    if not router.kind.scaled or (router.num_routers and keys_per_expert(router) > 1):
        why = "has no rows" if not router.kind.scaled else "has several keys"
        raise UserError(f"MOE {root}: an expert {why} in its router, which cannot be copied")
    if router.num_routers and N % router.num_routers:  # its query maps stay as they are
        mixture = f"MOE {root} has a mixture of {router.num_routers} routers"
        raise UserError(f"--num-experts {N}: {mixture}; give a multiple of {router.num_routers}")
    if more.keep_function:
        softmax = getattr(moe.args, "moe_router_score_function", "softmax") == "softmax"
        grouped = getattr(moe.args, "moe_router_group_topk", None)
        kept = (more.top_k in (None, router.top_k), more.duplicate == "even", softmax, not grouped)
        if not all(kept) or router.pooling == "max":
            raise UserError(
                "--keep-function: is for --duplicate even, without --top-k, and a MOE with softmax, sum"
                " pooling and no groups of experts (moe_router_group_topk)"
            )


def _copies(root: Path, router: RouterConfig, more: MoreExperts, num_layers: int) -> Copies:
    """For each layer, the expert of each new number: all in turn, or by load the busiest more often."""
    n, N = router.num_experts, more.num_experts
    if more.duplicate == "even":
        return (tuple(number % n for number in range(N)),) * num_layers
    lines = [line for line in run_log.read(root / run_log.ROUTING) if line.get("load")][-LINES_OF_LOAD:]
    try:
        loads = torch.tensor([line["load"] for line in lines], dtype=torch.float64)  # [lines, L, n]
    except (TypeError, ValueError):  # not numbers, or rows of different lengths
        loads = torch.empty(0)
    if loads.shape[1:] != (num_layers, n):
        why = f"has no loads of {num_layers} layers and {n} experts in {run_log.ROUTING}"
        raise UserError(
            f"--duplicate load: MOE {root} {why}; name a folder that pretrain saved to, or use even"
        )
    copies = []
    for load in loads.sum(dim=0).tolist():
        found = list(range(n))
        while len(found) < N:
            found.append(max(range(n), key=lambda expert: load[expert] / found.count(expert)))  # noqa: B023 - used at once
        copies.append(tuple(found))
    return tuple(copies)


def _routing(args: Any, router: RouterConfig, grown: RouterConfig, grouped: bool) -> dict[str, Any]:
    """Megatron's arguments that change."""
    arguments: dict[str, Any] = {"num_experts": grown.num_experts, "moe_router_topk": grown.top_k}
    if grouped:
        copies = grown.num_experts // router.num_experts
        arguments |= {"moe_router_num_groups": copies, "moe_router_group_topk": 1}
        if router.pre_softmax:  # a softmax over all copies gives each a part of its expert's weight
            scale = getattr(args, "moe_router_topk_scaling_factor", None) or 1.0
            arguments["moe_router_topk_scaling_factor"] = scale * copies
    return arguments


def _flags(args: Any, model: DenseModel, record: dict[str, Any] | None) -> dict[str, Any]:
    """The flags of ``moe`` for the manifest: those of its own, or made of its arguments."""
    if record is not None:
        return dict(manifest.section(record, "model", f"{manifest.NAME}:"))
    return model.flags | recorded_flags(vars(args), model.ffn_hidden_size)
