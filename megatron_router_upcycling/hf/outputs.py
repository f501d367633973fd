"""The tensors of an exported folder: in which order they come, what each is made from, and in which file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.name_table import Row


@dataclass(frozen=True)
class Moved:
    """Rows of a Megatron tensor: ``runs`` of them at a place of its stack."""

    tensor: str
    index: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Folded:
    """A tensor of a layer's folded router (``Kind.gate``)."""

    layer: int
    name: str


@dataclass(frozen=True)
class Zeros:
    """A part of the shared expert, which adds nothing."""


@dataclass(frozen=True)
class Output:
    """A tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]
    source: Moved | Folded | Zeros

    def num_bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


def outputs(
    model: QwenModel, stored: dict[str, str], gate: dict[str, tuple[int, ...]], shared_expert_width: int
) -> Iterator[Output]:
    """Every tensor of the folder, in the order of the model.

    Args:
        stored: a row's tensor in ``name_table`` -> the name that the checkpoint has for it.
        gate: the tensors of a layer's folded router, with their shapes; none in a dense model.
        shared_expert_width: of the expert of zeros in Qwen2-MoE.
    """
    rows = name_table.rows(model)

    def moved(row: Row, index: tuple[int, ...]) -> Iterator[Output]:
        for number, part in enumerate(row.parts):
            runs = tuple(name_table.runs(row, number, model))
            name, shape = name_table.name(part, index), name_table.shape(part, model)
            yield Output(name, shape, Moved(stored[row.megatron], index, runs))

    embedding, *others = [row for row in rows if not name_table.stack(row, model)]
    yield from moved(embedding, ())
    for layer in range(model.num_layers):
        for row in rows:
            if name_table.stack(row, model):
                for index in name_table.indices_in(layer, row, model):
                    yield from moved(row, index)
        for name, shape in gate.items():
            yield Output(f"{name_table.GATE.format(layer=layer)}.{name}", shape, Folded(layer, name))
        if gate and model.family == "qwen2":
            yield from _shared_expert(model, layer, shared_expert_width)
    for row in others:
        yield from moved(row, ())


def _shared_expert(model: QwenModel, layer: int, width: int) -> Iterator[Output]:
    parts = name_table.SHARED_EXPERT if width else ()
    for part in (*parts, name_table.SHARED_EXPERT_GATE):
        yield Output(name_table.name(part, (layer,)), name_table.shape(part, model, width), Zeros())


def split(tensors: list[Output], dtype: torch.dtype, limit: int) -> list[list[Output]]:
    """``tensors`` in files of at most ``limit`` bytes, or of one tensor that is larger."""
    shards: list[list[Output]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes(dtype) > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes(dtype)
    return shards
