"""The steps of a conversion: what becomes of each entry of the dense checkpoint, and how it is done.

``plan`` chooses the steps. Each says which entries of the dense checkpoint it accounts for, which entries of
the new one it makes (``makes``) and what their values must be (``expects``, which ``verify`` compares with);
``run`` does it, with one chunk in memory at a time.

Symbols of shapes: L layers, n experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, COMMON_STATE
from megatron_router_upcycling.checkpoint.names import at_layer, split_key
from megatron_router_upcycling.checkpoint.publish.completeness import Target
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion.expected import Computed, Expected, InTurn, Origin, copy_of
from megatron_router_upcycling.conversion.fine_grained import SHARE, Cut
from megatron_router_upcycling.conversion.moe_arguments import moe_common_state
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.ablations import alter_expert
from megatron_router_upcycling.initialisation.first_routers import router_values
from megatron_router_upcycling.key_statistics.file import KeyStats


@dataclass(frozen=True)
class Work:
    """What the steps read."""

    dense: Checkpoint  # its layers stacked
    source: Checkpoint  # the same, its layers apart where those of the new checkpoint are
    model: DenseModel
    options: Options
    layers: tuple[int, ...] | None  # those that get experts; None: all
    stats: KeyStats | None
    scratch: bytearray  # for the largest chunk that something is made from

    @property
    def moe_layers(self) -> Sequence[int]:
        return self.layers or range(self.model.num_layers)


class Step:
    """One step of a plan."""

    def accounts_for(self) -> tuple[str, ...]:
        """The entries of the dense checkpoint that are dealt with here and nowhere else."""
        return ()

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        """The entries of the new checkpoint: shape and dtype of a tensor, None for an object."""
        return {}

    def expects(self, work: Work) -> dict[str, Expected]:
        """What the tensors that it makes must hold. Nothing is computed before a value is asked for."""
        return {}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        """Do it."""


def like(source: Checkpoint, key: str) -> Target:
    """What ``key`` of the dense checkpoint is."""
    stored = source.tensors.get(key)
    return (stored.shape, stored.dtype) if stored else None


@dataclass(frozen=True)
class Keep(Step):
    """Take tensors and objects over under their own names, their bytes untouched."""

    keys: tuple[str, ...]

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {key: like(source, key) for key in self.keys}

    def expects(self, work: Work) -> dict[str, Expected]:
        return {key: copy_of(key, "untouched") for key in self.keys if key in work.source.tensors}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        for key in self.keys:
            writer.take_over(work.source, key, key, copy=work.options.materialize)


@dataclass(frozen=True)
class CopyNorm(Step):
    """Give a norm before the FFN its other name as well."""

    key: str
    other: str

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.other: like(source, self.key)}

    def expects(self, work: Work) -> dict[str, Expected]:
        return {self.other: copy_of(self.key, "norms")}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        writer.take_over(work.source, self.key, self.other, copy=work.options.materialize)


@dataclass(frozen=True)
class MakeExperts(Step):
    """Make ``target`` [L, n, ...] of ``key`` [L, ...].

    ``front`` is 1, or 0 for a layer under a key of its own, without the axis of layers.
    """

    key: str
    target: str
    num_experts: int
    front: int

    def accounts_for(self) -> tuple[str, ...]:
        return (self.key,)

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.target: (self.shape(source), source.tensors[self.key].dtype)}

    def shape(self, source: Checkpoint) -> Shape:
        return self._at_experts(source.tensors[self.key].shape, self.num_experts)

    def _at_experts(self, place: Shape, experts: int) -> Shape:
        """A place or shape of the dense parameter's with its part along the axis of experts."""
        return (*place[: self.front], experts, *place[self.front :])

    def _apart(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The experts in a box of ``target``, each with its box, which has no axis of experts."""
        front = self.front
        offsets, sizes = (place[:front] + place[front + 1 :] for place in (box.offsets, box.sizes))
        for expert in range(box.offsets[front], box.ends[front]):
            yield expert, Box(offsets, sizes)

    def _together(self, expert: int, box: Box) -> Box:
        """The inverse: a box of one expert as a box of ``target``."""
        return Box(self._at_experts(box.offsets, expert), self._at_experts(box.sizes, 1))


@dataclass(frozen=True)
class CopyExperts(MakeExperts):
    """Make experts that are copies: the bytes are written once, or once an expert with ``--materialize``."""

    def expects(self, work: Work) -> dict[str, Expected]:
        def origins(box: Box) -> Iterator[Origin]:
            for expert, part in self._apart(box):
                yield Origin(self._together(expert, part), self.key, part)

        return {self.target: Expected("experts", origins)}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        stored, shape = work.source.tensors[self.key], self.shape(work.source)
        for chunk in stored.chunks:
            sizes = self._at_experts(chunk.sizes, 1)
            offsets = [self._at_experts(chunk.offsets, expert) for expert in range(self.num_experts)]
            copies = work.options.materialize
            writer.store_chunk(work.source, chunk, stored.dtype, self.target, shape, sizes, offsets, copies)


@dataclass(frozen=True)
class CutExperts(MakeExperts):
    """Make experts that are shards of copies (``--granularity``); a shard's bytes serve all copies."""

    cut: Cut

    def shape(self, source: Checkpoint) -> Shape:
        return self._at_experts(self.cut.shape(source.tensors[self.key].shape), self.num_experts)

    def expects(self, work: Work) -> dict[str, Expected]:
        shape = work.source.tensors[self.key].shape

        def origins(box: Box) -> Iterator[Origin]:
            for expert, shard in self._apart(box):
                for part, place in self.cut.sources(shard, expert % self.cut.granularity, shape):
                    yield Origin(self._together(expert, part), self.key, place)

        return {self.target: Expected("experts", origins)}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        stored, shape = work.source.tensors[self.key], self.shape(work.source)
        for chunk in stored.chunks:
            tensor = work.source.read_chunk(chunk, stored.dtype, work.scratch)
            for shard, values, place in self.cut.shards(tensor, chunk.offsets, stored):
                experts = range(shard, self.num_experts, self.cut.granularity)
                offsets = [self._at_experts(place, expert) for expert in experts]
                values = values.unsqueeze(self.front).contiguous()
                writer.write_chunk(self.target, shape, values, offsets, work.options.materialize)


@dataclass(frozen=True)
class AlterExperts(MakeExperts):
    """Make experts that differ from each other, each stored."""

    def expects(self, work: Work) -> dict[str, Expected]:
        name, own = split_key(self.key)

        def expert(*index: int) -> torch.Tensor:
            layer = index[0] if own is None else own
            return self._alter(work, work.dense.read_layer(name, layer, bytearray()), layer, index[-1])

        return {self.target: Computed(expert, self.shape(work.source), self.front + 1).expected("experts")}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        (name, own), shape = split_key(self.key), self.shape(work.source)
        for layer in range(work.model.num_layers) if own is None else (own,):
            weight = work.dense.read_layer(name, layer, work.scratch)
            for expert in range(self.num_experts):
                made = self._alter(work, weight, layer, expert)
                offsets = self._at_experts((layer, 0, 0) if own is None else (0, 0), expert)
                writer.write_chunk(self.target, shape, made[(None,) * (self.front + 1)], [offsets])

    def _alter(self, work: Work, weight: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        options, linear = work.options, self.key.split(".")[-2]
        return alter_expert(weight, linear, work.model.gated, options.init, options.seed, layer, expert)


@dataclass(frozen=True)
class CopyShared(Step):
    """Make a parameter of the shared expert, FC1 as it is and FC2 ``scaled`` by its share."""

    key: str
    target: str
    scaled: bool

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.target: like(source, self.key)}

    def expects(self, work: Work) -> dict[str, Expected]:
        if not self.scaled:
            return {self.target: copy_of(self.key, "experts")}
        name, own = split_key(self.key)

        def share(*index: int) -> torch.Tensor:
            return work.dense.read_layer(name, index[0] if own is None else own, bytearray()) * SHARE

        shape = work.source.tensors[self.key].shape
        return {self.target: Computed(share, shape, int(own is None)).expected("experts")}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        if not self.scaled:
            writer.take_over(work.source, self.key, self.target, copy=work.options.materialize)
            return
        stored = work.source.tensors[self.key]
        for chunk in stored.chunks:
            values = work.source.read_chunk(chunk, stored.dtype, work.scratch) * SHARE
            writer.write_chunk(self.target, stored.shape, values, [chunk.offsets])


@dataclass(frozen=True)
class MakeRouters(Step):
    """Make the routers' ``parameters``: key and shape over all layers.

    ``layers``: only for these, each under a key of its own.
    """

    parameters: tuple[tuple[str, Shape], ...]
    layers: tuple[int, ...] | None
    dtype: torch.dtype

    def shapes(self) -> dict[str, Shape]:
        if self.layers is None:
            return dict(self.parameters)
        return {at_layer(key, layer): shape[1:] for layer in self.layers for key, shape in self.parameters}

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {key: (shape, self.dtype) for key, shape in self.shapes().items()}

    def expects(self, work: Work) -> dict[str, Expected]:
        routers = InTurn(lambda: self._values(work))
        expected = {}
        for place, (key, shape) in enumerate(self.parameters):

            def value(layer: int, place: int = place) -> torch.Tensor:
                return routers[work.moe_layers.index(layer)][place]

            if self.layers is None:
                expected[key] = Computed(value, shape, 1).expected("routers")
            for layer in self.layers or ():
                own = Computed(lambda value=value, layer=layer: value(layer), shape[1:], 0)  # type: ignore[misc]
                expected[at_layer(key, layer)] = own.expected("routers")
        return expected

    def _values(self, work: Work) -> Iterator[tuple[torch.Tensor, ...]]:
        """The parameters of one layer's router after the other."""
        options, layers = work.options, work.moe_layers
        file = (work.stats, options.key_stats) if work.stats and options.key_stats else None
        return router_values(
            work.dense, work.model, options.router, options.init, file, options.seed, work.scratch, layers
        )

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        writer.next_file()
        for layer, values in zip(work.moe_layers, self._values(work), strict=True):
            for (key, shape), value in zip(self.parameters, values, strict=True):
                if not value.isfinite().all():
                    raise UserError(f"--key-stats: too large for {self.dtype} in layer {layer} ({key})")
                nowhere = (0,) * value.dim()
                if self.layers is None:
                    writer.write_chunk(key, shape, value[None], [(layer, *nowhere)])
                else:
                    writer.write_chunk(at_layer(key, layer), shape[1:], value, [nowhere])


@dataclass(frozen=True)
class AddExtraStates(Step):
    """Write the empty entries that modules of an MoE layer look for, ``added``.

    ``keys`` go: those of the dense FFN, and those that only a torch_dist checkpoint can hold.
    """

    keys: tuple[str, ...]
    added: tuple[str, ...]

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return dict.fromkeys(self.added)

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        empty = writer.write_object(torch_save_file.dump([None]))
        for key in self.added:
            writer.add_object(key, empty)


@dataclass(frozen=True)
class WriteCommonState(Step):
    """Write the common state of a fresh MoE run, as an object or as a file; the dense run's goes."""

    keys: tuple[str, ...]
    as_file: bool

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {} if self.as_file else {COMMON_STATE: None}

    def run(self, work: Work, writer: CheckpointWriter) -> None:
        options = work.options
        common = moe_common_state(work.dense, work.model, options.router, options.shared_expert, work.layers)
        if self.as_file:
            writer.write_file(COMMON_FILE, torch_save_file.dump(common))
        else:
            writer.add_object(COMMON_STATE, writer.write_object(torch_save_file.dump([common])))


@dataclass(frozen=True)
class LeaveOut(Step):
    """Training state of the dense run, which the MoE run does not need."""

    keys: tuple[str, ...]

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys
