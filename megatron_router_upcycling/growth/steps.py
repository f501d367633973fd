"""The steps that give a Mixture-of-Experts more experts; each is a ``conversion.steps.Step``.

Symbols: L layers, n experts before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape, blocks
from megatron_router_upcycling.checkpoint.names import split_key
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion.steps import BLOCK, Computed, Expected, Made, Origin, Step, Work
from megatron_router_upcycling.initialisation.ablations import generator

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
        return (*before[: self.axis], len(self.copies[0]), *before[self.axis + 1 :])


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
                            writer.write_chunk(self.key, shape, values, offsets, work.options.materialize)


@dataclass(frozen=True)
class RepeatRows(Repeat):
    """Give a router's parameter the rows of the new experts, with ``noise``."""

    noise: float
    by_copy: bool  # one vector of noise for all experts of a copy

    def expects(self, work: Work) -> Made:
        shape, dtype = self.shape(work), work.source.tensors[self.key].dtype
        computed = Computed(partial(self._rows, work), shape, self.axis)
        return {self.key: computed.expected("routers", shape, dtype)}

    def _rows(self, work: Work, *layer: int) -> torch.Tensor:
        """The rows of a layer; those of the first copies are the old ones."""
        source, (name, own) = work.source, split_key(self.key)
        stored = source.read_layer(self.key, layer[0], bytearray()) if layer else source.read_box(self.key)
        before = len(stored)
        rows = stored[torch.tensor(self.copies[layer[0] if layer else 0])]
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
