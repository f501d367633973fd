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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape, blocks
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.format.metadata import StoredTensor
from megatron_router_upcycling.checkpoint.names import (
    EXPERTS,
    ROUTER,
    SHARED_EXPERT,
    TRAINING_STATE,
    extra_states,
    split_key,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.conversion.steps import (
    BLOCK,
    Computed,
    Expected,
    Made,
    Origin,
    Step,
    Take,
    Work,
    WriteStates,
)
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.ablations import generator
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import all_parameters, keys_per_expert
from megatron_router_upcycling.training.run_log import files as run_log

DUPLICATE = ("even", "load")
ROUTER_NOISE = 0.3  # of six values, that of the lowest loss at the first step (docs/comparison.md)
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
class MoreExperts:
    """The options. ``top_k``: None keeps it; ``router_noise``: over the root mean square of a row."""

    num_experts: int
    top_k: int | None = None
    duplicate: str = "even"
    router_noise: float = ROUTER_NOISE
    keep_function: bool = False
    copies: "Copies | None" = None  # by ``load``, as the manifest records them

    def first_step(self, top_k: int) -> str:
        """What the model is before training, in words."""
        if self.keep_function:
            return "it is the model it was made of: a token's experts are all of one copy"
        if self.top_k:
            return f"a token goes to {top_k} experts, the copies of those that it went to among them"
        return (
            "the loss is above that of the model it was made of: copies of one expert are chosen together, so"
            f" that a token's {top_k} experts are fewer different ones (--keep-function avoids it)"
        )

    @classmethod
    def recorded(cls, values: Any, source: Path) -> Self:
        """From a manifest's section."""
        try:
            copies = values["copies"]
            copies = None if copies is None else tuple(tuple(map(int, row)) for row in copies)
            return cls(**values | {"copies": copies})
        except (TypeError, ValueError, KeyError):
            raise UserError(f"{source}: has no readable 'more_experts'; convert the model again") from None


type Copies = tuple[tuple[int, ...], ...]  # for each layer, the expert that each of the new ones copies


@dataclass(frozen=True)
class Repeat(Step):
    """Give ``key`` [L, n, ...], or one layer's [n, ...], more experts."""

    key: str
    copies: Copies  # one row for each index on the layer axis, or one

    @property
    def axis(self) -> int:
        """The expert axis."""
        return int(split_key(self.key)[1] is None)

    def shape(self, work: Work) -> Shape:
        before = work.source.tensors[self.key].shape
        times = len(self.copies[0]) // (1 + max(self.copies[0]))
        return (*before[: self.axis], before[self.axis] * times, *before[self.axis + 1 :])


@dataclass(frozen=True)
class RepeatExperts(Repeat):
    """Name the experts' chunks again. One of several experts or layers, which no name can cut, is copied."""

    def _layers(self, box: Box) -> Iterator[tuple[Box, tuple[int, ...]]]:
        """A box cut along its layers, each with its row of ``copies``."""
        for layer in range(box.offsets[0], box.ends[0]) if self.axis else ():
            yield box.along(0, layer, 1), self.copies[layer]
        if not self.axis:
            yield box, self.copies[0]

    def expects(self, work: Work) -> Made:
        axis, dtype = self.axis, work.source.tensors[self.key].dtype

        def origins(box: Box) -> Iterator[Origin]:
            for layer, copies in self._layers(box):
                for expert in range(layer.offsets[axis], layer.ends[axis]):
                    one, place = layer.along(axis, expert, 1), layer.along(axis, copies[expert], 1)
                    yield Origin(one, self.key, place)

        return {self.key: Expected("experts", self.shape(work), dtype, origins)}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        axis, shape, stored = self.axis, self.shape(work), work.source.tensors[self.key]
        for chunk in stored.chunks:
            layers = list(self._layers(chunk.box))
            is_one = len(layers) == 1 and chunk.sizes[axis] == 1
            for layer, copies in layers:
                for old in range(layer.offsets[axis], layer.ends[axis]):
                    new = [number for number, origin in enumerate(copies) if origin == old]
                    for part in [chunk.box] if is_one else blocks(layer.along(axis, old, 1), BLOCK):
                        offsets = [part.along(axis, number, 1).offsets for number in new]
                        if is_one and not work.options.materialize:
                            writer.take_chunk(work.source, chunk, self.key, shape, stored.dtype, offsets)
                        else:
                            values = work.source.read_box(self.key, part)
                            copied = work.options.materialize
                            writer.write_chunk(self.key, shape, values, offsets, copied)


@dataclass(frozen=True)
class RepeatRows(Repeat):
    """Give a router's parameter the rows of the new experts, with ``noise``."""

    noise: float
    by_copy: bool  # one vector of noise for all experts of a copy

    def expects(self, work: Work) -> Made:
        computed = Computed(partial(self._rows, work), self.shape(work), self.axis)
        return {self.key: computed.expected("routers", work.source.tensors[self.key].dtype)}

    def _rows(self, work: Work, *layer: int) -> torch.Tensor:
        """The rows of a layer; those of the first copies are the old ones."""
        source, (name, own) = work.source, split_key(self.key)
        stored = source.read_layer(self.key, layer[0], bytearray()) if layer else source.read_box(self.key)
        copies = torch.tensor(self.copies[layer[0] if layer else 0])
        before = len(stored)
        rows = stored[copies]
        if not self.noise:
            return rows
        random = generator(work.options.seed, "more experts", name, layer[0] if layer else own)
        values, drawn = rows.float(), torch.randn(rows.shape, generator=random)
        squares = values.double().square()
        scale = squares.mean(dim=1, keepdim=True).sqrt()
        if self.by_copy:
            drawn, scale = drawn[torch.arange(len(rows)) // before * before], squares.mean().sqrt()
        drawn[:before] = 0
        return (values + drawn * scale.float() * self.noise).to(rows.dtype)

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        for layer in range(len(self.copies)):
            place = (layer,) * self.axis
            values = self._rows(work, *place)
            rest = (0,) * values.dim()
            writer.write_chunk(self.key, self.shape(work), values[(None,) * self.axis], [(*place, *rest)])


@dataclass(frozen=True, kw_only=True)
class Growth(Plan):
    """The plan of a conversion that only adds experts."""

    more: MoreExperts

    def values_taken_over(self) -> Iterator[tuple[Checkpoint, str]]:
        """The routers' parameters; the experts' values are not read (``verify`` reads them)."""
        for step in self.steps:
            if isinstance(step, RepeatRows):
                yield self.source, step.key


def plan(moe: Checkpoint, more: MoreExperts, options: Options) -> Growth:
    """Decide what becomes of every entry of ``moe``; router and start in ``options`` become its own."""
    record = manifest.read(moe.root)
    router = manifest.router_of(record, moe.args, moe.root)
    experts = [key for key in moe.tensors if _is_expert(key)]
    if not experts:
        raise UserError(
            f"MOE {moe.root}: its experts are not stored as {EXPERTS}; save it with Megatron 0.19"
        )
    model = DenseModel.from_arguments(moe.args, dtype=moe.tensors[experts[0]].dtype)
    _check(moe, model, router, more)
    layers = tuple(sorted({layer for key in experts if (layer := split_key(key)[1]) is not None}))
    copies = more.copies or _copies(moe.root, router, more, len(layers) or model.num_layers)

    def copies_of(key: str) -> Copies:
        layer = split_key(key)[1]
        return copies if layer is None else (copies[layers.index(layer)],)

    parameters = all_parameters(router, model, model.linear_bias)
    of_experts = {f"{ROUTER}.{name}" for name in (*(p.name for p in parameters if p.per_expert), *BALANCING)}
    noisy, steps = f"{ROUTER}.{router.kind.scaled}", list[Step]()
    kept, left_out = list[str](), list[str]()
    for key in (*moe.tensors, *moe.objects):
        if TRAINING_STATE.match(key):
            left_out.append(key)
        elif _is_expert(key) and key in moe.tensors:
            steps.append(RepeatExperts(key, copies_of(key)))
        elif (name := split_key(key)[0]) in of_experts:
            noise = more.router_noise if name == noisy else 0.0
            steps.append(RepeatRows(key, copies_of(key), noise, more.keep_function))
        elif key != COMMON_STATE and not _is_expert(key):
            kept.append(key)
    grown = replace(router, num_experts=more.num_experts, top_k=more.top_k or router.top_k)
    init = manifest.init_config(record or {}, moe.root)
    shared = any(split_key(key)[0].startswith(SHARED_EXPERT) for key in moe.tensors)
    states = extra_states(model.num_layers, more.num_experts, model.qk_norm, shared, layers or None)
    routed = _routing(moe.args, router, grown, more.keep_function)
    steps.sort(key=lambda step: isinstance(step, RepeatRows))  # stable: experts first
    rows = [step for step in steps if isinstance(step, RepeatRows)]
    again = [] if options.materialize else [key for key in experts if not _is_apart(moe.tensors[key], key)]
    written = sum(map(moe.stored_bytes, again))
    if options.materialize:
        written = sum(map(moe.stored_bytes, experts)) * more.num_experts // router.num_experts
    return Growth(
        dense=moe,
        source=moe,
        model=model,
        options=replace(options, router=grown, init=init, shared_expert=shared),
        arguments=routed,
        layers=layers or None,
        flags=_flags(moe.args, model, record)
        | {flag: value for flag, value in routed.items() if flag in GROUPS},
        steps=(
            Take({key: key for key in kept}, "untouched"),
            *steps,
            WriteStates(
                tuple(key for key in states if key not in kept),
                common_as_file=(moe.iteration_dir / COMMON_FILE).is_file(),
            ),
        ),
        kept=tuple(kept),
        left_out=tuple(left_out),
        kept_bytes=sum(map(moe.stored_bytes, (*kept, *experts))),
        changed_bytes=sum(moe.stored_bytes(key) for key in kept if not moe.is_verbatim(key)),
        expert_bytes=written,
        router_bytes=sum(moe.stored_bytes(row.key) for row in rows) * more.num_experts // router.num_experts,
        scratch_bytes=0,
        more=replace(more, copies=copies if more.duplicate == "load" else None),
    )


def _is_expert(key: str) -> bool:
    return split_key(key)[0].startswith(f"{EXPERTS}.")


def _is_apart(stored: StoredTensor, key: str) -> bool:
    """Whether each chunk belongs to one expert of one layer, so that it can be named again."""
    axes = range(1 + (split_key(key)[1] is None))
    return all(chunk.stored is None and chunk.sizes[axis] == 1 for chunk in stored.chunks for axis in axes)


def _check(moe: Checkpoint, model: DenseModel, router: RouterConfig, more: MoreExperts) -> None:
    n, N, root = router.num_experts, more.num_experts, moe.root
    if n >= N or (more.duplicate == "even" and N % n):
        multiple = f" that is a multiple of {n}" if more.duplicate == "even" else ""
        raise UserError(f"--num-experts {N}: MOE {root} has {n} experts; give a larger number{multiple}")
    if not 0 <= more.router_noise < math.inf:
        raise UserError(f"--router-noise {more.router_noise}: must be 0 or more")
    if not router.kind.scaled or (router.num_routers and keys_per_expert(router) > 1):
        why = "has no rows" if not router.kind.scaled else "has several keys"
        raise UserError(f"MOE {root}: an expert {why} in its router, which cannot be copied")
    if router.router == "mixture":  # the mixture of more experts must have the same query maps
        grown = replace(router, num_experts=N)
        sizes = [one.shape(model.num_attention_heads, model.kv_channels) for one in (router, grown)]
        if sizes[0].router_width != sizes[1].router_width:
            raise UserError(f"--num-experts {N}: its mixture of {router.num_routers} routers has other sizes")
    for key, stored in moe.tensors.items():
        if _is_expert(key) and stored.shape[int(split_key(key)[1] is None)] != n:
            raise UserError(
                f"MOE {root}: {key} is {list(stored.shape)}, and its arguments ask for {n} experts"
            )
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
    loads = [line["load"] for line in lines]
    if not loads or any(len(load) != num_layers or {len(row) for row in load} != {n} for load in loads):
        why = f"has no loads of {num_layers} layers and {n} experts in {run_log.ROUTING}"
        raise UserError(
            f"--duplicate load: MOE {root} {why}; name a folder that pretrain saved to, or use even"
        )
    copies = []
    for layer in range(num_layers):
        load = [sum(line[layer][expert] for line in loads) for expert in range(n)]
        found = list(range(n))
        while len(found) < N:
            found.append(max(range(n), key=lambda expert: load[expert] / found.count(expert)))
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
        return dict(record["model"])
    flags = {name: value for name in MOE_FLAGS if (value := getattr(args, name, None))}
    if (frequency := getattr(args, "moe_layer_freq", 1)) != 1:
        flags["moe_layer_freq"] = str(frequency).replace(" ", "")
    return model.flags | flags
