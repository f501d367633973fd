"""Plan a conversion from the dense checkpoint's metadata alone; no value is read.

The experts are copies of the dense FFN (arXiv 2509.00679, eq. 3); routers are made from attention heads and
key statistics (eq. 4, 5) or drawn at random (vanilla upcycling); everything else is taken over unchanged.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.layers import split_layers
from megatron_router_upcycling.checkpoint.publish.checks import Target
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion import fine_grained, steps
from megatron_router_upcycling.conversion.moe_arguments import PLAIN, moe_arguments, recorded_flags
from megatron_router_upcycling.conversion.options import Options, parse_layers
from megatron_router_upcycling.conversion.steps import Expected, Made, Step, Take, Work
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.first_routers import router_parameters
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.routers.config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Plan(Work):
    """The steps, what they read, and how many bytes they write and hold in memory."""

    flags: dict[str, Any]  # Megatron's, of the new model, for the manifest
    steps: tuple[Step, ...]
    kept: tuple[str, ...]  # entries of ``source`` that are taken over unchanged
    left_out: tuple[str, ...]  # entries of its training state, which the MoE run does not need
    kept_bytes: int  # of what is taken over: linked, or copied where no link can be made
    changed_bytes: int  # of these, what cannot be linked, since torch_dist stores it differently
    expert_bytes: int
    router_bytes: int
    scratch_bytes: int  # of the largest chunk that values are computed from
    first_step: str  # what the new model is before training, in words
    record: dict[str, Any] = field(default_factory=dict)  # entries of the manifest besides the usual ones

    @property
    def memory_bytes(self) -> int:
        """The most memory that the model's values take: one chunk; for a router made from heads also a
        layer's QKV weight twice (joined from chunks, split into heads), its router and the previous one."""
        model = self.model
        if not self.options.init.of_heads(self.options.router):
            return self.scratch_bytes
        heads = model.num_attention_heads + 2 * model.num_query_groups
        rows = heads * model.kv_channels * model.hidden_size * model.dtype.itemsize
        return self.scratch_bytes + 2 * rows + 2 * self.router_bytes // len(self.moe_layers)

    def _made(self, work: Work) -> Made:
        return {key: expected for step in self.steps for key, expected in step.expects(work).items()}

    def makes(self) -> dict[str, Target]:
        """Every entry of the new checkpoint: shape and dtype of a tensor, None for an object."""
        return {key: made and (made.shape, made.dtype) for key, made in self._made(self).items()}

    def expects(self, stats: KeyStats | None) -> dict[str, Expected]:
        """What every tensor of the new checkpoint must hold."""
        return {key: made for key, made in self._made(replace(self, stats=stats)).items() if made}

    def values_taken_over(self) -> Iterator[tuple[Checkpoint, str]]:
        """The tensors whose values the new checkpoint contains or is computed from."""
        keys = [key for key in self.source.tensors if not names.TRAINING_STATE.match(key)]
        sources = {one.root: one for one in self.experts if one is not None}  # each once
        replaced = bool(sources) and not self.options.shared_expert  # the FFNs of ``source``
        for key in keys:
            is_ffn = names.is_ffn(names.split_key(key)[0])
            if not (is_ffn and replaced):
                yield self.source, key
            for one in sources.values() if is_ffn or self.options.average_rest else ():
                yield one, key

    def run(self, stats: KeyStats | None, writer: CheckpointWriter) -> None:
        work = replace(self, stats=stats, scratch=bytearray(self.scratch_bytes))
        for step in self.steps:
            step.run(work, writer)


def plan(
    dense: Checkpoint, model: DenseModel, options: Options, sources: Sequence[Checkpoint | None] = ()
) -> Plan:
    """Decide what becomes of every entry of ``dense`` and, for experts, of other ``sources``."""
    router = options.router
    fine_grained.check(dense, model, router.granularity, options.shared_expert)
    layers = None if options.layers is None else parse_layers(options.layers, model.num_layers)
    source = dense if layers is None else split_layers(dense)

    def is_ffn(key: str) -> bool:
        """Whether ``key`` belongs to an FFN that becomes experts."""
        return names.is_ffn(names.split_key(key)[0]) and _gets_experts(key, layers)

    keys = (*source.tensors, *source.objects)
    left_out = tuple(key for key in keys if names.TRAINING_STATE.match(key))
    ffn = list(filter(is_ffn, source.tensors))
    made_anew = [key for key in source.objects if names.EXTRA_STATE in key and is_ffn(key)]
    gone = {*left_out, *ffn, COMMON_STATE, *made_anew}
    kept = tuple(key for key in keys if key not in gone)
    for key in kept:
        if not names.MODEL_STATE.match(key):
            raise UserError(f"DENSE {source.root}: holds {key}, which convert does not support")
    # The norms before the experts, also under their other name where the dense checkpoint lacks that.
    others = {key: names.other_norm(key) for key in kept if _gets_experts(key, layers)}
    norms = {key: other for key, other in others.items() if other and other not in kept}
    experts = [_expert(key, model, router) for key in ffn]
    shared = [_shared(key) for key in ffn] if options.shared_expert else []
    states = names.extra_states(
        model.num_layers, router.num_experts, model.qk_norm, options.shared_expert, layers
    )
    averaged = {key: key for key in kept if options.average_rest and key in source.tensors}
    all_steps = [
        Take({key: key for key in kept if key not in averaged}, "untouched"),
        steps.Average(averaged, "untouched"),
        steps.Average(norms, "norms") if options.average_rest else Take(norms, "norms"),
        *experts,
        *shared,
        steps.MakeRouters(),
        steps.WriteStates(
            tuple(key for key in states if key in gone or key not in source.objects),
            common_as_file=(dense.iteration_dir / COMMON_FILE).is_file(),
        ),
    ]
    arguments = moe_arguments(model, options, layers)
    changed = [key for key in kept if not source.is_verbatim(key)]
    copies = router.num_copies if options.materialize else max(1, len(sources))
    read = [names.at_layer(names.QKV, None if layers is None else 0)]
    made = (steps.CutExperts, steps.ShareOutput)  # whose values are read, not taken over
    read += [step.key for step in (*experts, *shared) if isinstance(step, made)]
    num_routers = model.num_layers if layers is None else len(layers)
    return Plan(
        dense=dense,
        source=source,
        model=model,
        options=options,
        arguments=arguments | PLAIN,
        experts=tuple(one if one is None or layers is None else split_layers(one) for one in sources),
        layers=layers,
        flags=model.flags | recorded_flags(arguments, model.ffn_hidden_size),
        steps=tuple(all_steps),
        kept=kept,
        left_out=left_out,
        kept_bytes=sum(map(source.stored_bytes, kept)),
        changed_bytes=sum(source.stored_bytes(key) for key in {*changed, *averaged}),
        expert_bytes=(copies + options.shared_expert) * sum(map(source.stored_bytes, ffn)),
        router_bytes=num_routers
        * sum(math.prod(shape[1:]) for _, shape in router_parameters(model, router))
        * model.dtype.itemsize,
        scratch_bytes=max(map(source.largest_chunk, read)),
        first_step=_first_step(router, len(sources)),
    )


def _first_step(router: RouterConfig, num_models: int) -> str:
    """What the new model is before training, after "before training"."""
    if num_models:
        return f"it is none of its {num_models} models: a token's experts are of several"
    if router.pre_softmax:
        return (
            f"the loss is above the dense model's: a token's {router.top_k} experts have less than the whole"
            f" weight, which softmax spreads over all {router.num_experts}; training makes up for it"
        )
    first = "it is exactly the dense model"
    if router.granularity == 1:
        first += "; its loss gives the router no gradient until the experts differ"
    return first


def _gets_experts(key: str, layers: tuple[int, ...] | None) -> bool:
    return layers is None or names.split_key(key)[1] in layers


def _expert(key: str, model: DenseModel, router: RouterConfig) -> steps.CopyExperts:
    """The step that makes the experts' parameter from the FFN's ``key``."""
    name, layer = names.split_key(key)
    target = names.at_layer(names.EXPERTS + name.removeprefix(names.MLP), layer)
    if router.granularity > 1:
        axis = int(layer is None)  # of FC1's rows; FC2 is cut along its columns
        if name.startswith(f"{names.FC1}."):
            cut = fine_grained.Cut(axis, 1 + model.gated, router.granularity)
        else:
            cut = fine_grained.Cut(axis + 1, 1, router.granularity)
        return steps.CutExperts(key, target, router.num_experts, cut)
    return steps.CopyExperts(key, target, router.num_experts)


def _shared(key: str) -> Take | steps.ShareOutput:
    """The step that makes the shared expert's parameter from the FFN's ``key``."""
    name, layer = names.split_key(key)
    target = names.at_layer(names.SHARED_EXPERT + name.removeprefix(names.MLP), layer)
    return steps.ShareOutput(key, target) if name.startswith(names.FC2) else Take({key: target}, "experts")
