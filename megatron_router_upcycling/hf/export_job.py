"""An export that is ready to run: its tensors in their order, how each is made, and in which file."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.names import ROUTER, other_norm
from megatron_router_upcycling.checkpoint.read_config_json import CLASSES
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint, tensor_in
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import SINGLE_FILE, numbered
from megatron_router_upcycling.hf.name_table import Index, Tensor
from megatron_router_upcycling.hf.safetensors_file import cast
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig

SIZE_BESIDE_ZEROS = 2.0**-6  # of the gate of a shared expert of zeros: any size works
SIZE_OF_HALF = 2.0**-40  # of a gate whose sigmoid must be one half: it is, rounded to float32

type Gate = dict[str, torch.Tensor]


class Output(NamedTuple):
    """A tensor of the folder. ``read(start, stop, scratch)`` makes its rows, in ``scratch`` if they fit."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int, bytearray], torch.Tensor]


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_size: int = 5 * 10**9  # bytes of a file
    shared_expert_width: int | None = None  # of a shared expert of zeros; None: 128
    modelling_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Export:
    """Everything that is known before a byte is written."""

    checkpoint: Checkpoint
    out: Path
    model: QwenModel
    router: RouterConfig | None
    shared_expert_width: int  # the model's own, or that of a shared expert of zeros
    dtype: torch.dtype
    beside: Path | None  # the folder of the files besides the weights: tokenizer and more
    options: Options
    manifest: dict[str, Any] | None

    @functools.cached_property
    def gate(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer's folded router, with their shapes; none in a dense model."""
        return kinds.gate_shapes(self.router, self.model) if self.router else {}

    @functools.cached_property
    def shards(self) -> dict[str, list[Output]]:
        """The files of weights: each of at most ``max_shard_size``, or of one tensor that is larger."""
        shards: list[list[Output]] = [[]]
        size = 0
        for output in outputs(self):
            count = math.prod(output.shape) * self.dtype.itemsize
            size += count
            if shards[-1] and size > self.options.max_shard_size:
                shards.append([])
                size = count
            shards[-1].append(output)
        count = len(shards)
        names = [numbered(number, count) for number in range(1, count + 1)] if count > 1 else [SINGLE_FILE]
        return dict(zip(names, shards, strict=True))

    @property
    def bytes_to_write(self) -> int:
        shapes = [output.shape for shard in self.shards.values() for output in shard]
        return sum(map(math.prod, shapes)) * self.dtype.itemsize

    def read_gate(self, layer: int) -> Gate:
        """A layer's router as ``Kind.gate`` folds it, in float32."""
        router = self.router
        assert router is not None
        place = self.model.expert_layers.index(layer)
        values = {
            parameter.name: self.checkpoint.read_layer(f"{ROUTER}.{parameter.name}", place, bytearray())
            for parameter in router.kind.parameters(router, self.model)
        }
        return router.kind.gate(values, router, self.model.hidden_size, torch.float32)

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own classes can represent the model."""
        return self.router is None or self.router.kind.not_stock(self.router) is None

    @property
    def class_name(self) -> str:
        """The class that loads the folder."""
        stock = CLASSES[self.model.model_type]
        return stock if self.is_stock else f"Upcycled{stock}"


def stored_name(checkpoint: Checkpoint, name: str) -> str:
    """The name that ``checkpoint`` has for ``name_table``'s tensor ``name``; norms have two names."""
    return name if name in checkpoint.tensors else other_norm(name) or name


def outputs(job: Export) -> Iterator[Output]:
    """Every tensor of the folder, in the order of the model."""
    model, tensors = job.model, name_table.tensors(job.model)
    embedding, *others = [tensor for tensor in tensors if None in tensor.layers]
    (first,) = _moved(job, embedding, None)
    yield first
    read_gate = functools.lru_cache(1)(job.read_gate)  # for all tensors and blocks of a layer's gate
    for layer in range(model.num_layers):
        for tensor in tensors:
            if layer in tensor.layers:
                yield from _moved(job, tensor, layer)
        if layer in model.expert_layers:
            for name, shape in job.gate.items():
                part = functools.partial(lambda layer, name: read_gate(layer)[name], layer, name)
                yield _made(job, f"{name_table.GATE.format(layer=layer)}.{name}", shape, part)
            if model.family == "qwen2":
                yield from _shared_expert(job, layer)
    for tensor in others:
        yield from _moved(job, tensor, None)
    if model.num_experts and model.tied:
        # SGLang does not tie embeddings in an MoE, nor llama.cpp in Qwen2-MoE; others ignore this tensor.
        yield first._replace(name=name_table.LM_HEAD)


def _moved(job: Export, tensor: Tensor, layer: int | None) -> Iterator[Output]:
    """The outputs that ``tensor`` holds for a layer."""
    for index, place in tensor.places(layer):
        for number, part in enumerate(tensor.parts):
            read = functools.partial(_read_rows, job, tensor, number, place)
            yield Output(name_table.name(part, index), tensor.part_shapes[number], read)


def _read_rows(
    job: Export, tensor: Tensor, part: int, place: Index, start: int, stop: int, scratch: bytearray
) -> torch.Tensor:
    """Rows of a part, gathered from Megatron's tensor."""
    name, columns = stored_name(job.checkpoint, tensor.name), tensor.part_shapes[part][1:]
    values = tensor_in(scratch, job.checkpoint.tensors[name].dtype, (stop - start, *columns))
    ones, zeros = (1,) * len(place), (0,) * len(columns)
    for _, first, last, begin in name_table.cut(tensor.runs(part), start, stop):
        box = Box((*place, first, *zeros), (*ones, last - first, *columns))
        target = values[begin : begin + last - first]
        job.checkpoint.read_box(name, box, target.view(box.sizes))
    if (scale := name_table.scale(tensor, job.model)) != 1.0:
        values = values.float() * scale  # rounded once, where the dtype cannot hold the product
    return cast(values, job.dtype, f"{job.checkpoint.root}: {name}")


def _made(job: Export, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Output:

    def read(start: int, stop: int, scratch: bytearray) -> torch.Tensor:
        return cast(make()[start:stop], job.dtype, f"{job.checkpoint.root}: {name}")

    return Output(name, shape, read)


def _shared_expert(job: Export, layer: int) -> Iterator[Output]:
    """What Qwen2-MoE requires and the checkpoint lacks: a shared expert of zeros, and a gate for it."""
    model = job.model
    if job.shared_expert_width and not model.shared_expert_size:
        for part in name_table.SHARED_EXPERT:
            shape = name_table.shape(part, model, job.shared_expert_width)
            zeros = functools.partial(torch.zeros, shape, dtype=job.dtype)
            yield _made(job, name_table.name(part, (layer,)), shape, zeros)
    if not model.shared_expert_gated:
        name = name_table.name(name_table.SHARED_EXPERT_GATE, (layer,))
        yield _made(job, name, (1, model.hidden_size), functools.partial(_drawn_gate, job, layer))


def _drawn_gate(job: Export, layer: int) -> torch.Tensor:
    """A gate of small random numbers, not zeros: llama.cpp computes sigmoid(x) as silu(x) / x, NaN at 0."""
    size = size_of_half(job.dtype) if job.model.shared_expert_size else SIZE_BESIDE_ZEROS
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(1, job.model.hidden_size, generator=generator) * size


def size_of_half(dtype: torch.dtype) -> float:
    """The size of the values of a gate whose sigmoid is one half."""
    limits = torch.finfo(dtype)
    return max(SIZE_OF_HALF, 16 * limits.smallest_normal * limits.eps)  # float16 has few values below that
