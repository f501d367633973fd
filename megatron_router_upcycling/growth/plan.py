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

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE, locate
from megatron_router_upcycling.checkpoint.names import (
    EXPERTS,
    ROUTER,
    SHARED_EXPERT,
    TRACKER,
    TRAINING_STATE,
    extra_states,
    split_key,
)
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.publish.checks import Stamps
from megatron_router_upcycling.checkpoint.read_model import model_of
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.convert import Conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.conversion.steps import Take, WriteStates
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.growth.steps import Copies, RepeatExperts, RepeatRows
from megatron_router_upcycling.routers.config import Recorded, RouterConfig
from megatron_router_upcycling.routers.kinds import all_parameters, keys_per_expert
from megatron_router_upcycling.training.run_log import files as run_log

DUPLICATE = ("even", "load")
ROUTER_NOISE = 0.3  # of six values, that of the lowest loss at the first step (docs/comparison.md)
LITTLE_NOISE = 0.01  # with softmax before top-k, a copy's weights move with it
MOST_EXPERTS = 10_000
LINES_OF_LOAD = 10  # of routing.jsonl, the last ones, whose mean is an expert's load
GROUPS = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor")
# Rows that a run adds to a router to balance its experts.
BALANCING = ("expert_bias", "qb_beta", "local_tokens_per_expert")
# Megatron's arguments of an MoE, for the manifest of one that another tool trained.
MOE_FLAGS = (
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_enable_expert_bias"),
)


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


def prepare(root: str | Path, out: str | Path, more: MoreExperts, options: Options) -> Conversion:
    """Read and check everything, as ``convert.prepare``; of ``options``, router and start are not used."""
    out, folder = Path(out), locate(Path(root))[1]
    stamps = Stamps([*folder.rglob("*"), folder.parent / run_log.ROUTING])
    moe = open_checkpoint(root)
    publish.check_target(out, moe.root, options.overwrite, source_name="MOE", made_by=TRACKER)
    conversion = Conversion(plan(moe, more, options), None, out, stamps)
    publish.check_space(out, conversion.bytes_to_write)
    return conversion


def plan(moe: Checkpoint, more: MoreExperts, options: Options) -> Growth:
    """Decide what becomes of every entry of ``moe``; router and start in ``options`` become its own."""
    record = manifest.read(moe.root)
    router = manifest.router_of(record, moe.args, moe.root)
    experts = [key for key in moe.tensors if _is_expert(key)]
    if not experts:
        raise UserError(
            f"MOE {moe.root}: its experts are not stored as {EXPERTS}; save it with Megatron 0.19"
        )
    model = model_of(moe, moe.tensors[experts[0]].dtype)
    _check(moe, model, router, more)
    layers = tuple(sorted({layer for key in experts if (layer := split_key(key)[1]) is not None}))
    copies = more.copies or _copies(moe.root, router, more, len(layers) or model.num_layers)
    sound = all(len(row) == more.num_experts and set(row) <= set(range(router.num_experts)) for row in copies)
    if not sound or len(copies) != (len(layers) or model.num_layers):
        raise UserError(f"{moe.root}: the recorded copies of its experts do not fit; convert it again")

    def copies_of(key: str) -> Copies:
        layer = split_key(key)[1]
        return copies if layer is None else (copies[layers.index(layer)],)

    parameters = all_parameters(router, model, model.linear_bias)
    of_experts = {f"{ROUTER}.{name}" for name in (*(p.name for p in parameters if p.per_expert), *BALANCING)}
    noise = more.noise(router)
    experts_steps = [RepeatExperts(key, copies_of(key)) for key in experts]
    rows_steps = [
        RepeatRows(
            key, copies_of(key), noise * (name == f"{ROUTER}.{router.kind.scaled}"), more.keep_function
        )
        for key in moe.tensors
        if (name := split_key(key)[0]) in of_experts
    ]
    for step in (*experts_steps, *rows_steps):
        sizes = [router.num_experts] if layers else [model.num_layers, router.num_experts]
        if list(moe.tensors[step.key].shape[: len(sizes)]) != sizes:
            found = f"{step.key} is {list(moe.tensors[step.key].shape)}"
            raise UserError(f"MOE {moe.root}: {found}, and its arguments ask for {sizes} in front")
    keys = (*moe.tensors, *moe.objects)
    left_out = tuple(key for key in keys if TRAINING_STATE.match(key))
    gone = {*left_out, COMMON_STATE, *filter(_is_expert, keys), *(step.key for step in rows_steps)}
    kept = tuple(key for key in keys if key not in gone)
    more = replace(more, router_noise=noise, copies=copies if more.duplicate == "load" else None)
    grown = replace(router, num_experts=more.num_experts, top_k=more.top_k or router.top_k)
    routed = _routing(moe.args, router, grown, more.keep_function)
    flags = {flag: value for flag, value in routed.items() if flag in GROUPS}
    shared = any(split_key(key)[0].startswith(SHARED_EXPERT) for key in moe.tensors)
    states = extra_states(model.num_layers, more.num_experts, model.qk_norm, shared, layers or None)
    new_states = tuple(key for key in states if key not in kept)
    common_as_file = (moe.iteration_dir / COMMON_FILE).is_file()
    return Growth(
        dense=moe,
        source=moe,
        model=model,
        options=replace(
            options, router=grown, init=manifest.init_config(record or {}, moe.root), shared_expert=shared
        ),
        arguments=routed,
        layers=layers or None,
        flags=_flags(moe.args, model, record) | flags,
        steps=(
            Take({key: key for key in kept}, "untouched"),
            *experts_steps,
            *rows_steps,
            WriteStates(new_states, common_as_file),
        ),
        kept=kept,
        left_out=left_out,
        kept_bytes=sum(map(moe.stored_bytes, (*kept, *experts))),
        changed_bytes=sum(moe.stored_bytes(key) for key in kept if not moe.is_verbatim(key)),
        expert_bytes=_expert_bytes(
            moe, experts, options.materialize and more.num_experts / router.num_experts
        ),
        router_bytes=sum(moe.stored_bytes(step.key) for step in rows_steps)
        * more.num_experts
        // router.num_experts,
        scratch_bytes=0,
        first_step=f"{more.first_step(grown.top_k, grown.pre_softmax)}; the optimizer starts afresh",
        record={"more_experts": asdict(more)},
    )


def _is_expert(key: str) -> bool:
    return split_key(key)[0].startswith(f"{EXPERTS}.")


def _expert_bytes(moe: Checkpoint, experts: list[str], times: float) -> int:
    """What must be written of the experts: all ``times`` over, or what cannot be named again."""
    if times:
        return int(times * sum(map(moe.stored_bytes, experts)))
    written = 0
    for key in experts:
        axes = range(1 + (split_key(key)[1] is None))  # layers and experts, or experts
        chunks = moe.tensors[key].chunks
        if any(chunk.stored is not None or chunk.sizes[axis] > 1 for chunk in chunks for axis in axes):
            written += moe.stored_bytes(key)
    return written


def _check(moe: Checkpoint, model: DenseModel, router: RouterConfig, more: MoreExperts) -> None:
    n, N, root = router.num_experts, more.num_experts, moe.root
    if not n < N <= MOST_EXPERTS or (more.duplicate == "even" and N % n):
        multiple = f" that is a multiple of {n}" if more.duplicate == "even" else ""
        raise UserError(f"--num-experts {N}: MOE {root} has {n} experts; give a larger number{multiple}")
    if not 0 <= more.noise(router) < math.inf:
        raise UserError(f"--router-noise {more.router_noise}: must be 0 or more")
    if not router.kind.scaled or (router.num_routers and keys_per_expert(router) > 1):
        why = "has no rows" if not router.kind.scaled else "has several keys"
        raise UserError(f"MOE {root}: an expert {why} in its router, which cannot be copied")
    if router.num_routers is not None:  # the mixture of more experts must have the same query maps
        grown = replace(router, num_experts=N)
        sizes = [one.shape(model.num_attention_heads, model.kv_channels) for one in (router, grown)]
        if sizes[0].router_width != sizes[1].router_width:
            raise UserError(f"--num-experts {N}: its mixture of {router.num_routers} routers has other sizes")
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
        if not isinstance(record.get("model"), dict):
            raise UserError(f"{manifest.NAME}: has no 'model' section; convert the model again")
        return dict(record["model"])
    flags = {name: value for name in MOE_FLAGS if (value := getattr(args, name, None))}
    if (frequency := getattr(args, "moe_layer_freq", 1)) != 1:
        flags["moe_layer_freq"] = str(frequency).replace(" ", "")
    return model.flags | flags
