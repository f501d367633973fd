"""The steps of a conversion: what becomes of each entry of the dense checkpoint, and how it is done.

``plan`` chooses the steps. Each says which entries of the dense checkpoint it accounts for and which entries
of the new one it makes; ``run`` does it, with one chunk in memory at a time.

Symbols of shapes: L layers, n experts.
"""

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
from megatron_router_upcycling.conversion.fine_grained import SHARE, Cut
from megatron_router_upcycling.conversion.moe_arguments import moe_common_state
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation import random_weights
from megatron_router_upcycling.initialisation.ablations import alter_expert
from megatron_router_upcycling.initialisation.first_routers import router_values
from megatron_router_upcycling.key_statistics.file import KeyStats


@dataclass(frozen=True)
class Work:
    """What the steps read and fill."""

    dense: Checkpoint  # its layers stacked
    source: Checkpoint  # the same, its layers apart where those of the new checkpoint are
    model: DenseModel
    options: Options
    layers: tuple[int, ...] | None  # those that get experts; None: all
    stats: KeyStats | None
    writer: CheckpointWriter
    scratch: bytearray  # for the largest chunk that something is made from

    def take_over(self, key: str, name: str) -> None:
        """Let ``name`` stand for what ``key`` is in the dense checkpoint, its bytes untouched."""
        self.writer.take_over(self.source, key, name, copy=self.options.materialize)


class Step:
    """One step of a plan."""

    def accounts_for(self) -> tuple[str, ...]:
        """The entries of the dense checkpoint that are dealt with here and nowhere else."""
        return ()

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        """The entries of the new checkpoint: shape and dtype of a tensor, None for an object."""
        return {}

    def run(self, work: Work) -> None:
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

    def run(self, work: Work) -> None:
        for key in self.keys:
            work.take_over(key, key)


@dataclass(frozen=True)
class CopyNorm(Step):
    """Give a norm before the FFN its other name as well."""

    key: str
    other: str

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.other: like(source, self.key)}

    def run(self, work: Work) -> None:
        work.take_over(self.key, self.other)


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


@dataclass(frozen=True)
class CopyExperts(MakeExperts):
    """Make experts that are copies: the bytes are written once, or once an expert with ``--materialize``."""

    def run(self, work: Work) -> None:
        stored, shape = work.source.tensors[self.key], self.shape(work.source)
        for chunk in stored.chunks:
            sizes = self._at_experts(chunk.sizes, 1)
            offsets = [self._at_experts(chunk.offsets, expert) for expert in range(self.num_experts)]
            copies = work.options.materialize
            work.writer.store_chunk(
                work.source, chunk, stored.dtype, self.target, shape, sizes, offsets, copies
            )


@dataclass(frozen=True)
class CutExperts(MakeExperts):
    """Make experts that are shards of copies (``--granularity``); a shard's bytes serve all copies."""

    cut: Cut

    def shape(self, source: Checkpoint) -> Shape:
        return self._at_experts(self.cut.shape(source.tensors[self.key].shape), self.num_experts)

    def run(self, work: Work) -> None:
        stored, shape = work.source.tensors[self.key], self.shape(work.source)
        for chunk in stored.chunks:
            tensor = work.source.read_chunk(chunk, stored.dtype, work.scratch)
            for shard, values, place in self.cut.shards(tensor, chunk.offsets, stored):
                experts = range(shard, self.num_experts, self.cut.granularity)
                offsets = [self._at_experts(place, expert) for expert in experts]
                values = values.unsqueeze(self.front).contiguous()
                work.writer.write_chunk(self.target, shape, values, offsets, work.options.materialize)


@dataclass(frozen=True)
class AlterExperts(MakeExperts):
    """Make experts that differ from each other, each stored."""

    def run(self, work: Work) -> None:
        model, options = work.model, work.options
        name, own = split_key(self.key)
        linear, shape = name.split(".")[-2], self.shape(work.source)
        for layer in range(model.num_layers) if own is None else (own,):
            weight = work.dense.read_layer(name, layer, work.scratch)
            for expert in range(self.num_experts):
                made = alter_expert(weight, linear, model.gated, options.init, options.seed, layer, expert)
                offsets = self._at_experts((layer, 0, 0) if own is None else (0, 0), expert)
                work.writer.write_chunk(self.target, shape, made[(None,) * (self.front + 1)], [offsets])


@dataclass(frozen=True)
class CopyShared(Step):
    """Make a parameter of the shared expert, FC1 as it is and FC2 ``scaled`` by its share."""

    key: str
    target: str
    scaled: bool

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.target: like(source, self.key)}

    def run(self, work: Work) -> None:
        if not self.scaled:
            work.take_over(self.key, self.target)
            return
        stored = work.source.tensors[self.key]
        for chunk in stored.chunks:
            values = work.source.read_chunk(chunk, stored.dtype, work.scratch) * SHARE
            work.writer.write_chunk(self.target, stored.shape, values, [chunk.offsets])


@dataclass(frozen=True)
class Draw(Step):
    """Make ``key`` at random, with the dtype of the dense model's ``model_key``.

    ``replaces``: no other step accounts for ``model_key``.
    """

    key: str
    shape: Shape
    model_key: str
    replaces: bool

    def accounts_for(self) -> tuple[str, ...]:
        return (self.model_key,) if self.replaces else ()

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {self.key: (self.shape, source.tensors[self.model_key].dtype)}

    def run(self, work: Work) -> None:
        model, dtype = work.model, work.source.tensors[self.model_key].dtype
        mean, std = random_weights.first_values(
            self.key, model.init_method_std, model.num_layers, model.centered_norms
        )
        name, layer = split_key(self.key)
        for block in random_weights.blocks(self.shape):
            # A layer's own tensor has the values that it has where the layers are stacked.
            place = block if layer is None else Box((layer, *block.offsets), (1, *block.sizes))
            values = random_weights.draw(work.options.seed, name, place, mean, std).view(block.sizes)
            work.writer.write_chunk(self.key, self.shape, values.to(dtype), [block.offsets])


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

    def run(self, work: Work) -> None:
        options, model = work.options, work.model
        work.writer.next_file()
        layers = self.layers or range(model.num_layers)
        file = (work.stats, options.key_stats) if work.stats and options.key_stats else None
        made = router_values(
            work.dense, model, options.router, options.init, file, options.seed, work.scratch, layers
        )
        for layer, values in zip(layers, made, strict=True):
            for (key, shape), value in zip(self.parameters, values, strict=True):
                if not value.isfinite().all():
                    raise UserError(f"--key-stats: too large for {model.dtype} in layer {layer} ({key})")
                nowhere = (0,) * value.dim()
                if self.layers is None:
                    work.writer.write_chunk(key, shape, value[None], [(layer, *nowhere)])
                else:
                    work.writer.write_chunk(at_layer(key, layer), shape[1:], value, [nowhere])


@dataclass(frozen=True)
class AddExtraStates(Step):
    """Write the empty entries that modules of an MoE layer look for, ``added``.

    ``keys`` go: those of the dense FFN, and those that only a torch_dist checkpoint can hand on.
    """

    keys: tuple[str, ...]
    added: tuple[str, ...]

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return dict.fromkeys(self.added)

    def run(self, work: Work) -> None:
        empty = work.writer.write_object(torch_save_file.dump([None]))
        for key in self.added:
            work.writer.add_object(key, empty)


@dataclass(frozen=True)
class WriteCommonState(Step):
    """Write the common state of a fresh MoE run, as an object or as a file; the dense run's goes."""

    keys: tuple[str, ...]
    as_file: bool

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys

    def makes(self, source: Checkpoint) -> dict[str, Target]:
        return {} if self.as_file else {COMMON_STATE: None}

    def run(self, work: Work) -> None:
        options = work.options
        common = moe_common_state(work.dense, work.model, options.router, options.shared_expert, work.layers)
        if self.as_file:
            work.writer.write_file(COMMON_FILE, torch_save_file.dump(common))
        else:
            work.writer.add_object(COMMON_STATE, work.writer.write_object(torch_save_file.dump([common])))


@dataclass(frozen=True)
class LeaveOut(Step):
    """Training state that the MoE run does not go on from."""

    keys: tuple[str, ...]

    def accounts_for(self) -> tuple[str, ...]:
        return self.keys
