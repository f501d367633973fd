"""An export that is ready to run: its tensors in their order, what each is made from, and in which file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.hf import config_json, name_table, other_tools
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CARD
from megatron_router_upcycling.hf.name_table import Row
from megatron_router_upcycling.routers.config import RouterConfig

CONVERTED = "release"  # the iteration of a checkpoint that convert made
SIZE_BESIDE_ZEROS = 2.0**-6  # of a gate that weighs zeros: any size does
SIZE_OF_HALF = 2.0**-40  # of a gate whose sigmoid is to be one half: it is, rounded to float32


@dataclass(frozen=True)
class Moved:
    """Rows of a Megatron tensor: ``runs`` of them at a place of its stack, times ``scale``."""

    tensor: str
    index: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Folded:
    """A tensor of a layer's folded router (``Kind.gate``)."""

    layer: int
    name: str


@dataclass(frozen=True)
class Zeros:
    """A part of the shared expert that adds nothing."""


@dataclass(frozen=True)
class DrawnGate:
    """A layer's gate of the shared expert where the model has none: N(0, size), so that it is not 0.

    llama.cpp computes the sigmoid of x as silu(x) / x, which is NaN at 0.
    """

    layer: int
    size: float


@dataclass(frozen=True)
class Output:
    """A tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]
    source: Moved | Folded | Zeros | DrawnGate

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
            place = name_table.place(row, index, model)
            yield Output(name, shape, Moved(stored[row.megatron], place, runs, _scale(row, model)))

    embedding, *others = [row for row in rows if not name_table.stack(row, model)]
    (first,) = moved(embedding, ())
    yield first
    for layer in range(model.num_layers):
        for row in rows:
            if name_table.stack(row, model):
                for index in name_table.indices_in(layer, row, model):
                    yield from moved(row, index)
        if layer not in model.expert_layers:
            continue
        for name, shape in gate.items():
            yield Output(f"{name_table.GATE.format(layer=layer)}.{name}", shape, Folded(layer, name))
        if model.family == "qwen2":
            yield from _shared_expert(model, layer, shared_expert_width)
    for row in others:
        yield from moved(row, ())
    if model.num_experts and model.tied:
        # SGLang ties nothing in a Mixture-of-Experts, llama.cpp nothing in Qwen2-MoE; others pass it over.
        yield replace(first, name=name_table.LM_HEAD)


def _scale(row: Row, model: QwenModel) -> float:
    """What the values are multiplied by: classes of Qwen have no other place for these factors."""
    if row.megatron == name_table.EXPERTS_DOWN:
        return model.routed_scale
    if row.megatron == name_table.SHARED_DOWN and not model.shared_expert_gated:
        return 2.0  # ``SIZE_OF_HALF`` takes it back
    return 1.0


def _shared_expert(model: QwenModel, layer: int, width: int) -> Iterator[Output]:
    """What the checkpoint does not have of the shared expert."""
    if width and not model.shared_expert_size:
        for part in name_table.SHARED_EXPERT:
            yield Output(name_table.name(part, (layer,)), name_table.shape(part, model, width), Zeros())
    if not model.shared_expert_gated:
        part = name_table.SHARED_EXPERT_GATE
        size = SIZE_OF_HALF if model.shared_expert_size else SIZE_BESIDE_ZEROS
        yield Output(name_table.name(part, (layer,)), name_table.shape(part, model), DrawnGate(layer, size))


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


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    shared_expert_width: int | None = None  # of one of zeros; None: 128
    modelling_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Export:
    """Everything that is known before a byte is written."""

    checkpoint: Checkpoint
    out: Path
    model: QwenModel
    router: RouterConfig | None
    gate: dict[str, tuple[int, ...]]  # the tensors of a layer's folded router
    shared_expert_width: int  # the model's own, or that of one of zeros
    dtype: torch.dtype
    beside: Path | None  # what stands beside the weights: tokenizer and more
    options: Options
    stored: dict[str, str]  # a row's tensor in name_table -> the name that the checkpoint has for it
    shards: list[list[Output]]
    manifest: dict[str, Any] | None

    @property
    def bytes_to_write(self) -> int:
        return sum(output.num_bytes(self.dtype) for shard in self.shards for output in shard)

    @property
    def left_out(self) -> list[str]:
        """What stands beside the weights and does not go along."""
        if self.beside is None:
            return []
        found = beside.look(self.beside)
        own = [f"{CARD} (the export has its own)"] if Path(CARD) in found.carried else []
        return [*own, *found.left_out]

    @property
    def is_stock(self) -> bool:
        """Whether stock classes hold the model."""
        return self.router is None or self.router.kind.not_stock(self.router) is None

    @property
    def llama_cpp_fault(self) -> str | None:
        """Why llama.cpp does not compute what the stock classes do; None where it does."""
        if self.router is None or not self.is_stock:
            return None
        return other_tools.llama_cpp_fault(self.model, self.router, self.shared_expert_width)

    @property
    def is_untrained(self) -> bool:
        """Whether the experts are as ``convert`` made them."""
        return self.manifest is not None and self.checkpoint.iteration_dir.name == CONVERTED

    @property
    def aux_losses(self) -> dict[str, float]:
        """What balanced the experts' load in training, or is to balance it in the first."""
        if self.router is None:
            return {}
        trained = other_tools.balanced_by(self.checkpoint.args)
        return other_tools.UNTRAINED if self.is_untrained else trained

    @property
    def mbridge_fault(self) -> str | None:
        """Why mbridge does not compute what the stock classes do; None where it does."""
        if self.router is None or not self.is_stock:
            return None
        return other_tools.mbridge_fault(self.model, self.router)

    @property
    def aux_loss_coefficient(self) -> float:
        """What transformers multiplies its load balancing loss by."""
        assert self.router is not None
        layers = len(self.model.expert_layers)
        return other_tools.loss_coefficient(self.aux_losses, layers, self.router.top_k)

    @property
    def class_name(self) -> str:
        """The class that loads the folder."""
        stock = config_json.class_name(self.model)
        return stock if self.is_stock else f"Upcycled{stock}"
