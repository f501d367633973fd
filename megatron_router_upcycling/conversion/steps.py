"""The steps of a conversion: what the new checkpoint has, and how it is made.

``plan`` chooses the steps. Each says which entries of the new checkpoint it makes and what they must hold
(``expects``, which ``verify`` compares with); ``run`` makes them, with one chunk in memory at a time.

Symbols of shapes: L layers, n experts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape, blocks
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.format.metadata import Chunk
from megatron_router_upcycling.checkpoint.names import at_layer, split_key
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter, stored_values
from megatron_router_upcycling.conversion.fine_grained import SHARE, Cut
from megatron_router_upcycling.conversion.moe_arguments import fresh_common_state
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.first_routers import router_parameters, router_values
from megatron_router_upcycling.key_statistics.file import KeyStats

BLOCK = 1 << 20  # elements in memory at once


class Values:
    """Values that are not of ``Plan.source``."""

    def boxes(self, box: Box) -> Iterator[Box]:
        """The boxes that ``values`` is asked for, which together hold ``box``; each as it is, by default."""
        yield box

    def values(self, box: Box) -> torch.Tensor:
        """The values of one of the ``boxes``."""
        raise NotImplementedError

    def expected(self, check: str, shape: Shape, dtype: torch.dtype) -> "Expected":
        return Expected(check, shape, dtype, lambda box: [Origin(box, self, box)])


@dataclass(frozen=True, eq=False)
class MeanOf(Values):
    """Tensor ``key`` of several checkpoints, or of one: the mean in float64, rounded once."""

    checkpoints: Sequence[Checkpoint]
    key: str

    def values(self, box: Box) -> torch.Tensor:
        first, *others = (checkpoint.read_box(self.key, box) for checkpoint in self.checkpoints)
        total = first.double()
        for other in others:
            total += other.double()
        return (total / len(self.checkpoints)).to(first.dtype) if others else first


@dataclass(frozen=True, eq=False)
class Computed(Values):
    """A tensor of ``shape`` in slices: ``compute`` takes an index on each of its first ``num_axes`` axes."""

    compute: Callable[..., torch.Tensor]
    shape: Shape
    num_axes: int

    def boxes(self, box: Box) -> Iterator[Box]:
        count, rest = self.num_axes, self.shape[self.num_axes :]
        for index in itertools.product(*map(range, box.offsets[:count], box.ends[:count])):
            yield Box((*index, *(0 for _ in rest)), (*(1 for _ in index), *rest))

    def values(self, box: Box) -> torch.Tensor:
        return self.compute(*box.offsets[: self.num_axes])


class Origin(NamedTuple):
    """``box`` of a new tensor holds what ``place`` of ``source`` holds, element for element in order."""

    box: Box
    source: str | Values  # a key of ``Plan.source``, or other values
    place: Box


class Expected(NamedTuple):
    """A tensor of the new checkpoint, and where the values of a box of it come from."""

    check: str  # the check of ``verify`` that reports a difference
    shape: Shape
    dtype: torch.dtype
    origins: Callable[[Box], Iterable[Origin]]


def copy_of(source: Checkpoint, key: str, check: str) -> Expected:
    """A tensor that equals ``key`` of the dense checkpoint."""
    stored = source.tensors[key]
    return Expected(check, stored.shape, stored.dtype, lambda box: [Origin(box, key, box)])


class InTurn:
    """The items of ``make()`` by number; keeps one, and restarts to go back: routers are drawn in order."""

    def __init__(self, make: Callable[[], Iterator[tuple[torch.Tensor, ...]]]) -> None:
        self.make = make
        self._next, self._made = 0, make()
        self._item: tuple[torch.Tensor, ...] = ()

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        if number + 1 < self._next:
            self._next, self._made = 0, self.make()
        while self._next <= number:
            self._next, self._item = self._next + 1, next(self._made)
        return self._item


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the steps read."""

    dense: Checkpoint  # its layers stacked
    source: Checkpoint  # the same, with one key per layer where the new checkpoint has one
    model: DenseModel
    options: Options
    arguments: dict[str, Any]  # of Megatron, for the new checkpoint, in addition to the source's
    # The models of --experts, their keys as those of ``source``; None: gone since, which ``verify`` can meet.
    experts: tuple[Checkpoint | None, ...] = ()
    layers: tuple[int, ...] | None  # those that get experts; None: all
    stats: KeyStats | None = None
    scratch: bytearray = field(default_factory=bytearray)  # for the largest chunk to compute from

    @property
    def moe_layers(self) -> Sequence[int]:
        return self.layers or range(self.model.num_layers)


type Made = dict[str, Expected | None]


class Step:
    """One step of a plan."""

    def expects(self, work: Work) -> Made:
        """The entries that it makes: a tensor's expected values, computed lazily; None for an object."""
        raise NotImplementedError

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Take(Step):
    """Take tensors and objects over unchanged; ``targets``: key of ``source`` -> its new key."""

    targets: dict[str, str]
    check: str

    def expects(self, work: Work) -> Made:
        source = work.source
        return {
            target: copy_of(source, key, self.check) if key in source.tensors else None
            for key, target in self.targets.items()
        }

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        for key, target in self.targets.items():
            writer.take_over(work.source, key, target, copy=work.options.materialize)


@dataclass(frozen=True)
class Average(Step):
    """Make tensors the mean of the models of --experts; ``targets``: key of ``source`` -> its new key."""

    targets: dict[str, str]
    check: str

    def expects(self, work: Work) -> Made:
        made: Made = {}
        for key, target in self.targets.items():
            stored, there = work.source.tensors[key], [one for one in work.experts if one]
            made[target] = MeanOf(there, key).expected(self.check, stored.shape, stored.dtype)
            if len(there) < len(work.experts):  # without one of them the mean is not known
                made[target] = Expected(self.check, stored.shape, stored.dtype, lambda box: [])
        return made

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        for key, target in self.targets.items():
            stored, mean = work.source.tensors[key], MeanOf([one for one in work.experts if one], key)
            for box in blocks(Box((0,) * len(stored.shape), stored.shape), BLOCK):
                writer.write_chunk(target, stored.shape, mean.values(box), [box.offsets])


@dataclass(frozen=True)
class ShareOutput(Step):
    """Make FC2 of the shared expert: the dense FFN's, scaled by its share of the output."""

    key: str
    target: str

    def expects(self, work: Work) -> Made:
        (name, own), stored = split_key(self.key), work.source.tensors[self.key]

        def share(*index: int) -> torch.Tensor:
            return work.dense.read_layer(name, index[0] if own is None else own, bytearray()) * SHARE

        computed = Computed(share, stored.shape, int(own is None))
        return {self.target: computed.expected("experts", stored.shape, stored.dtype)}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        stored = work.source.tensors[self.key]
        for chunk in stored.chunks:
            values = work.source.read_chunk(chunk, stored.dtype, work.scratch) * SHARE
            writer.write_chunk(self.target, stored.shape, values, [chunk.offsets])


@dataclass(frozen=True)
class CopyExperts(Step):
    """Make n copies: ``target`` [L, n, ...] from ``key`` [L, ...], or [n, ...] from one layer's [...].

    The bytes are written once; with ``--materialize``, once for each expert.
    """

    key: str
    target: str
    num_experts: int

    granularity = 1

    def _source(self, work: Work, expert: int) -> Checkpoint | None:
        """The checkpoint of an expert's values: of several, one copy after the other takes the next."""
        sources = work.experts or (work.source,)
        return sources[expert // self.granularity % len(sources)]

    @property
    def front(self) -> int:
        """The number of axes before the expert axis: 1, or 0 for one layer's parameter."""
        return int(split_key(self.key)[1] is None)

    def shape(self, work: Work) -> Shape:
        return self._at_experts(work.source.tensors[self.key].shape, self.num_experts)

    def _at_experts(self, place: Shape, experts: int) -> Shape:
        """An offset or shape of the dense parameter, with ``experts`` inserted at the expert axis."""
        return (*place[: self.front], experts, *place[self.front :])

    def _apart(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The experts in a box of ``target``, each with its own box, without the expert axis."""
        front = self.front
        offsets, sizes = (place[:front] + place[front + 1 :] for place in (box.offsets, box.sizes))
        for expert in range(box.offsets[front], box.ends[front]):
            yield expert, Box(offsets, sizes)

    def _origins(self, work: Work, expert: int, box: Box) -> Iterator[tuple[Box, Box]]:
        """The parts of one expert's box, each with the box of ``key`` that it equals."""
        yield box, box

    def expects(self, work: Work) -> Made:
        apart = {id(source): MeanOf([source], self.key) for source in work.experts if source}

        def origins(box: Box) -> Iterator[Origin]:
            for expert, own in self._apart(box):
                source = self._source(work, expert)
                for part, place in self._origins(work, expert, own) if source else ():
                    whole = Box(self._at_experts(part.offsets, expert), self._at_experts(part.sizes, 1))
                    yield Origin(whole, apart.get(id(source), self.key), place)

        dtype = work.source.tensors[self.key].dtype
        return {self.target: Expected("experts", self.shape(work), dtype, origins)}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        shape, dtype = self.shape(work), work.source.tensors[self.key].dtype
        for source, chunk, experts in self._chunks(work):
            sizes = self._at_experts(chunk.sizes, 1)
            offsets = [self._at_experts(chunk.offsets, expert) for expert in experts]
            values = stored_values(source, chunk, dtype, sizes)
            writer.write_chunk(self.target, shape, values, offsets, work.options.materialize)

    def _chunks(self, work: Work) -> Iterator[tuple[Checkpoint, Chunk, list[int]]]:
        """The chunks of each source, with the experts of its values."""
        for source in work.experts or (work.source,):
            assert source is not None
            experts = [expert for expert in range(self.num_experts) if self._source(work, expert) is source]
            for chunk in source.tensors[self.key].chunks:
                yield source, chunk, experts


@dataclass(frozen=True)
class CutExperts(CopyExperts):
    """Make experts that are shards of copies (``--granularity``); all copies share a shard's bytes."""

    cut: Cut

    @property
    def granularity(self) -> int:  # type: ignore[override]
        return self.cut.granularity

    def shape(self, work: Work) -> Shape:
        return self._at_experts(self.cut.shape(work.source.tensors[self.key].shape), self.num_experts)

    def _origins(self, work: Work, expert: int, box: Box) -> Iterator[tuple[Box, Box]]:
        return self.cut.sources(box, expert % self.granularity, work.source.tensors[self.key].shape)

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        shape, stored = self.shape(work), work.source.tensors[self.key]
        for source, chunk, experts in self._chunks(work):
            tensor = source.read_chunk(chunk, stored.dtype, work.scratch)
            for shard, values, place in self.cut.shards(tensor, chunk.offsets, stored):
                equal = [expert for expert in experts if expert % self.granularity == shard]
                offsets = [self._at_experts(place, expert) for expert in equal]
                values = values.unsqueeze(self.front).contiguous()
                writer.write_chunk(self.target, shape, values, offsets, work.options.materialize)


class MakeRouters(Step):
    """Make the routers, stacked over layers; where only some layers have one, each under keys of its own."""

    def expects(self, work: Work) -> Made:
        routers, dtype = InTurn(lambda: self._values(work)), work.model.dtype
        expected: Made = {}
        for number, (key, shape) in enumerate(router_parameters(work.model, work.options.router)):

            def value(layer: int, number: int = number) -> torch.Tensor:
                return routers[work.moe_layers.index(layer)][number]

            if work.layers is None:
                expected[key] = Computed(value, shape, 1).expected("routers", shape, dtype)
            for layer in work.layers or ():
                own = Computed(partial(value, layer), shape[1:], 0)
                expected[at_layer(key, layer)] = own.expected("routers", own.shape, dtype)
        return expected

    def _values(self, work: Work) -> Iterator[tuple[torch.Tensor, ...]]:
        options = work.options
        return router_values(
            work.dense, work.model, options.router, options.init, work.stats, options.seed, work.moe_layers
        )

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        writer.next_file()
        parameters = router_parameters(work.model, work.options.router)
        for layer, values in zip(work.moe_layers, self._values(work), strict=True):
            for (key, shape), value in zip(parameters, values, strict=True):
                if not value.isfinite().all():
                    raise UserError(f"--key-stats: too large for {value.dtype} in layer {layer} ({key})")
                nowhere = (0,) * value.dim()
                if work.layers is None:
                    writer.write_chunk(key, shape, value[None], [(layer, *nowhere)])
                else:
                    writer.write_chunk(at_layer(key, layer), shape[1:], value, [nowhere])


@dataclass(frozen=True)
class WriteStates(Step):
    """Write the empty extra states that an MoE layer's modules load, and the common state of a fresh run."""

    empty: tuple[str, ...]
    common_as_file: bool  # else as an object

    def expects(self, work: Work) -> Made:
        return dict.fromkeys(self.empty if self.common_as_file else (*self.empty, COMMON_STATE))

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        blob = writer.write_object(torch_save_file.dump([None]))
        for key in self.empty:
            writer.objects[key] = blob
        common = fresh_common_state(work.dense, work.arguments)
        if self.common_as_file:
            writer.write_file(COMMON_FILE, torch_save_file.dump(common))
        else:
            writer.objects[COMMON_STATE] = writer.write_object(torch_save_file.dump([common]))
