"""One file of an exported folder's weights: its values are read, folded, cast and written block by block."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.names import ROUTER
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint, tensor_in
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.export_job import DrawnGate, Export, Folded, Moved, Output, Zeros
from megatron_router_upcycling.hf.safetensors_file import ahead, as_bytes, blocks, cast, format_header
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import Sizes

SAMPLE_TOKENS = 1024  # of a layer, to measure what rounding its gate changes


@dataclass
class Rounding:
    """Of a sample's top-k choices, how many change; sums over layers."""

    choices: int = 0
    by_rounding: int = 0  # the gate alone, everything else in float32
    by_arithmetic: int = 0  # the logits too, as a model in that dtype computes them

    def add(
        self,
        gate: dict[str, torch.Tensor],
        norm: torch.Tensor,
        router: RouterConfig,
        layer: int,
        dtype: torch.dtype,
    ) -> None:
        """Compare one layer's choices with its gate as it is and in ``dtype``.

        The sample is what a router sees of random hidden states of unit variance: the output of the norm
        before it, in ``dtype``.

        Args:
            gate: the folded router, in float32.
            norm: [D], the norm's weight.
        """
        generator = torch.Generator().manual_seed(layer)
        tokens = torch.randn(SAMPLE_TOKENS, len(norm), generator=generator) * norm.float()
        tokens = tokens.to(dtype)

        def choose(tokens: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
            """The choices with weights kept in ``kept``, computed in the dtype of ``tokens``."""
            rounded = {name: value.to(kept).to(tokens.dtype) for name, value in gate.items()}
            logits = router.kind.logits(rounded, tokens, router).float()
            return torch.zeros(logits.shape).scatter_(1, logits.topk(router.top_k, dim=1).indices, 1.0)

        exact = choose(tokens.float(), torch.float32)
        self.choices += SAMPLE_TOKENS * router.top_k
        self.by_rounding += int((exact > choose(tokens.float(), dtype)).sum())
        self.by_arithmetic += int((exact > choose(tokens, dtype)).sum())

    def describe(self, dtype: str) -> str:
        if dtype == "float32":
            return "the gates are kept as they were folded, in float32"
        return (
            f"routers in {dtype}, not float32: of {self.choices} choices of an expert for random tokens"
            f" {self.by_rounding} are others ({self.by_arithmetic} where logits are computed in {dtype} too)"
        )


def write_shard(
    job: Export,
    shard: list[Output],
    path: Path,
    rounding: Rounding,
    progress: Callable[[int], None],
) -> None:
    """Write the tensors of ``shard`` to a new file.

    Args:
        rounding: what the rounding of gates in it changes is added to this.
        progress: called with the number of bytes after each write.
    """
    with open(path, "xb") as file:
        file.write(format_header([(output.name, output.shape) for output in shard], job.dtype))
        for values in ahead(_tasks(job, shard, rounding)):
            file.write(as_bytes(values))
            progress(values.nbytes)


def _tasks(
    job: Export, shard: list[Output], rounding: Rounding
) -> Iterator[Callable[[bytearray], torch.Tensor]]:
    """What to call, in this order, for all values of a file."""
    for output in shard:
        match output.source:
            case Moved(tensor):
                row_bytes = math.prod(output.shape[1:]) * job.checkpoint.tensors[tensor].dtype.itemsize
                for rows in blocks(output.shape[0], row_bytes):
                    yield partial(_read_rows, job, output, output.source, rows)
            case Folded():
                yield partial(_fold, job, output.source, rounding)
            case Zeros():
                yield partial(_zeros, job, output)
            case DrawnGate():
                yield partial(_drawn_gate, job, output, output.source)


def _read_rows(
    job: Export, output: Output, source: Moved, rows: tuple[int, int], scratch: bytearray
) -> torch.Tensor:
    """Rows of a tensor, gathered from where they are in Megatron's."""
    stored, columns = job.checkpoint.tensors[source.tensor].dtype, output.shape[1:]
    values = tensor_in(scratch, stored, (rows[1] - rows[0], *columns))
    ones, zeros, position = (1,) * len(source.index), (0,) * len(columns), 0
    for _, first, last in name_table.cut(source.runs, *rows):
        box = Box((*source.index, first, *zeros), (*ones, last - first, *columns))
        target = values[position : position + last - first]
        job.checkpoint.read_box(source.tensor, box, target.view(box.sizes))
        position += last - first
    if source.scale != 1.0:
        values = values.float() * source.scale  # rounded once, where the dtype cannot hold the product
    return cast(values, job.dtype, f"{job.checkpoint.root}: {source.tensor}")


def _fold(job: Export, source: Folded, rounding: Rounding, scratch: bytearray) -> torch.Tensor:
    """A tensor of a layer's gate; with the first, what rounding them changes is added to ``rounding``."""
    assert job.router is not None
    layer = source.layer
    place = job.model.expert_layers.index(layer)
    gate = _read_gate(job.checkpoint, job.router, Sizes.of(job.model), place)
    values = cast(gate[source.name], job.dtype, f"{job.checkpoint.root}: the router of layer {layer}")
    if source.name == next(iter(job.gate)):
        norm = job.checkpoint.read_layer(job.stored[name_table.NORM_BEFORE_FFN], layer, bytearray())
        rounding.add(gate, norm, job.router, layer, job.dtype)
    return values


def _read_gate(
    checkpoint: Checkpoint, router: RouterConfig, sizes: Sizes, layer: int
) -> dict[str, torch.Tensor]:
    """One layer's router as ``Kind.gate`` folds it, in float32; ``layer`` counts those with experts."""
    values = {
        parameter.name: checkpoint.read_layer(f"{ROUTER}.{parameter.name}", layer, bytearray())
        for parameter in router.kind.parameters(router, sizes)
    }
    return router.kind.gate(values, router, sizes.hidden_size, torch.float32)


def _zeros(job: Export, output: Output, scratch: bytearray) -> torch.Tensor:
    return torch.zeros(output.shape, dtype=job.dtype)


def _drawn_gate(job: Export, output: Output, source: DrawnGate, scratch: bytearray) -> torch.Tensor:
    dtype = torch.finfo(job.dtype)
    size = max(source.size, 16 * dtype.smallest_normal * dtype.eps)  # float16 holds little below that
    generator = torch.Generator().manual_seed(source.layer)
    return (torch.randn(output.shape, generator=generator) * size).to(job.dtype)
