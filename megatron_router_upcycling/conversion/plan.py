"""What a conversion will do, decided from the dense checkpoint's metadata alone; no value is read.

The experts are copies of the dense FFN (arXiv 2509.00679, eq. 3); routers are made from attention heads and
key statistics (eq. 4, 5) or drawn at random (vanilla upcycling); all else is taken over as it is.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.layers import split_layers
from megatron_router_upcycling.checkpoint.names import at_layer, split_key
from megatron_router_upcycling.checkpoint.publish.completeness import Target
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion import fine_grained
from megatron_router_upcycling.conversion.expected import Expected
from megatron_router_upcycling.conversion.fine_grained import Cut
from megatron_router_upcycling.conversion.options import Options, parse_layers
from megatron_router_upcycling.conversion.steps import (
    AddExtraStates,
    AlterExperts,
    CopyExperts,
    CopyNorm,
    CopyShared,
    CutExperts,
    Keep,
    LeaveOut,
    MakeExperts,
    MakeRouters,
    Step,
    Work,
    WriteCommonState,
)
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.first_routers import router_parameters
from megatron_router_upcycling.key_statistics.file import KeyStats


@dataclass(frozen=True)
class Plan:
    """The steps, what they are made for, and how many bytes carrying them out writes and holds."""

    dense: Checkpoint  # its layers stacked
    source: Checkpoint  # the same, its layers apart where those of the new checkpoint are
    model: DenseModel
    options: Options
    layers: tuple[int, ...] | None  # those that get experts; None: all
    steps: tuple[Step, ...]
    kept_bytes: int  # of what is taken over: linked, or copied where no link can be made
    changed_bytes: int  # of these, what can never be linked: a torch_dist checkpoint stores it differently
    expert_bytes: int
    router_bytes: int
    scratch_bytes: int  # of the largest chunk that something is made from

    @property
    def memory_bytes(self) -> int:
        """What the model itself takes of memory at most, whatever its number of layers.

        A chunk that is read; for a router of heads, one layer's queries, keys and values twice (joined from
        chunks, then apart), its router, and that of the layer before.
        """
        model = self.model
        if not self.options.router.kind.of_heads:
            return self.scratch_bytes
        heads = model.num_attention_heads + 2 * model.num_query_groups
        rows = heads * model.kv_channels * model.hidden_size * model.dtype.itemsize
        layers = model.num_layers if self.layers is None else len(self.layers)
        return self.scratch_bytes + 2 * rows + 2 * self.router_bytes // layers

    def makes(self) -> dict[str, Target]:
        """Every entry of the new checkpoint: shape and dtype of a tensor, None for an object."""
        return {key: target for step in self.steps for key, target in step.makes(self.source).items()}

    def values_taken_over(self) -> list[str]:
        """The tensors of ``source`` whose values the new checkpoint has, or are made from."""
        steps = [step for step in self.steps if not isinstance(step, LeaveOut)]
        return [key for step in steps for key in step.accounts_for() if key in self.source.tensors]

    def expects(self, stats: KeyStats | None) -> dict[str, Expected]:
        """What every tensor of the new checkpoint must hold; shapes and dtypes are those of ``makes``."""
        work = self._work(stats, bytearray())
        return {key: expected for step in self.steps for key, expected in step.expects(work).items()}

    def run(self, stats: KeyStats | None, writer: CheckpointWriter) -> None:
        """Carry out the steps."""
        work = self._work(stats, bytearray(self.scratch_bytes))
        for step in self.steps:
            step.run(work, writer)

    def _work(self, stats: KeyStats | None, scratch: bytearray) -> Work:
        return Work(self.dense, self.source, self.model, self.options, self.layers, stats, scratch)


class Entries(NamedTuple):
    """The entries of a dense checkpoint by what becomes of them."""

    kept: tuple[str, ...]
    ffn: tuple[str, ...]  # of layers that get experts
    states: tuple[str, ...]  # extra states that go
    common: tuple[str, ...]
    left_out: tuple[str, ...]


def plan(dense: Checkpoint, model: DenseModel, options: Options) -> Plan:
    """Decide what becomes of every entry of ``dense``.

    Raises:
        UserError: it holds an entry that has no place in an MoE checkpoint, or sizes do not fit.
    """
    router, with_shared = options.router, options.shared_expert
    fine_grained.check(dense, model, router.granularity, with_shared)
    layers = None if options.layers is None else parse_layers(options.layers, model.num_layers)
    source = dense if layers is None else split_layers(dense)
    entries = _sort(source, layers)
    experts = [_expert(key, model, options) for key in entries.ffn]
    shared = [_shared(key) for key in entries.ffn] if options.shared_expert else []
    steps: list[Step] = [Keep(entries.kept), *_norms(entries.kept, layers), *experts, *shared]
    routers = MakeRouters(router_parameters(model, router), layers, model.dtype)
    states = names.extra_states(model.num_layers, router.num_experts, model.qk_norm, with_shared, layers)
    kept = set(entries.kept)
    steps += [
        routers,
        AddExtraStates(entries.states, tuple(key for key in states if key not in kept)),
        WriteCommonState(entries.common, as_file=(dense.iteration_dir / COMMON_FILE).is_file()),
        LeaveOut(entries.left_out),
    ]
    _check_accounts(steps, source)
    copies = router.num_copies if options.materialize or options.init.alters_experts else 1
    read = [at_layer(names.QKV, None if layers is None else 0)]
    read += [step.key for step in experts if not isinstance(step, CopyExperts)]
    read += [step.key for step in shared if step.scaled]
    return Plan(
        dense=dense,
        source=source,
        model=model,
        options=options,
        layers=layers,
        steps=tuple(steps),
        kept_bytes=sum(map(source.stored_bytes, entries.kept)),
        changed_bytes=sum(source.stored_bytes(key) for key in entries.kept if not source.is_verbatim(key)),
        expert_bytes=(copies + options.shared_expert) * sum(map(source.stored_bytes, entries.ffn)),
        router_bytes=sum(map(math.prod, routers.shapes().values())) * model.dtype.itemsize,
        scratch_bytes=max(map(source.largest_chunk, read)),
    )


def _sort(source: Checkpoint, layers: tuple[int, ...] | None) -> Entries:
    """The entries of ``source`` by what becomes of them."""

    def is_ffn(key: str) -> bool:
        return names.is_ffn(split_key(key)[0]) and _gets_experts(key, layers)

    keys = (*source.tensors, *source.objects)
    left_out = tuple(key for key in keys if names.TRAINING_STATE.match(key))
    ffn = tuple(filter(is_ffn, source.tensors))
    states = tuple(
        key
        for key in source.objects
        if names.EXTRA_STATE in key and (is_ffn(key) or not source.is_verbatim(key))
    )
    common = tuple(key for key in source.objects if key == COMMON_STATE)
    gone = {*left_out, *ffn, *states, *common}
    kept = tuple(key for key in keys if key not in gone)
    for key in kept:
        if not names.MODEL_STATE.match(key):
            raise UserError(f"DENSE {source.root}: holds {key}, which convert does not know what to make of")
    return Entries(kept, ffn, states, common, left_out)


def _gets_experts(key: str, layers: tuple[int, ...] | None) -> bool:
    return layers is None or split_key(key)[1] in layers


def _norms(kept: tuple[str, ...], layers: tuple[int, ...] | None) -> Iterator[CopyNorm]:
    """The norms before the experts under their other name, where the dense checkpoint has one of the two."""
    for key in kept:
        other = names.other_norm(key) if _gets_experts(key, layers) else None
        if other and other not in kept:
            yield CopyNorm(key, other)


def _expert(key: str, model: DenseModel, options: Options) -> MakeExperts:
    """The experts' parameter that is made of the FFN's ``key``."""
    router, (name, layer) = options.router, split_key(key)
    front = int(layer is None)
    target = at_layer(names.EXPERTS + name.removeprefix(names.MLP), layer)
    if options.init.alters_experts and name.endswith(".weight"):
        return AlterExperts(key, target, router.num_experts, front)
    if router.granularity > 1:
        cut = Cut.of(name, model, router.granularity, front)
        return CutExperts(key, target, router.num_experts, front, cut)
    return CopyExperts(key, target, router.num_experts, front)


def _shared(key: str) -> CopyShared:
    """The shared expert's parameter that is made of the FFN's ``key``."""
    name, layer = split_key(key)
    target = at_layer(names.SHARED_EXPERT + name.removeprefix(names.MLP), layer)
    return CopyShared(key, target, scaled=name.startswith(names.FC2))


def _check_accounts(steps: Iterable[Step], source: Checkpoint) -> None:
    """Every entry of the dense checkpoint is accounted for exactly once."""
    accounts = Counter(key for step in steps for key in step.accounts_for())
    accounts.subtract((*source.tensors, *source.objects))
    for key, count in accounts.items():
        if count:
            raise UserError(f"DENSE {source.root}: {key} would be {'used twice' if count > 0 else 'lost'}")
