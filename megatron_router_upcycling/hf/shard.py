"""One file of an exported folder's weights: its values are read, folded, cast and written block by block."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.rows import RowReader
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.outputs import DrawnGate, Folded, Moved, Output, Zeros
from megatron_router_upcycling.hf.rounding import Rounding, read_gate
from megatron_router_upcycling.hf.safetensors_file import format_header
from megatron_router_upcycling.hf.values import ahead, as_bytes, blocks, cast, scratch_rows
from megatron_router_upcycling.routers.kinds import Sizes


def write_shard(
    job: Export,
    shard: list[Output],
    reader: RowReader,
    path: Path,
    rounding: Rounding,
    progress: Callable[[int], None],
) -> None:
    """Write the tensors of ``shard`` to a new file.

    Args:
        rounding: what the rounding of gates in it changes is added to this.
        progress: called with the number of bytes after each write.

    Raises:
        UserError: a data file or a value is damaged.
    """
    with open(path, "xb") as file:
        file.write(format_header([(output.name, output.shape) for output in shard], job.dtype))
        for values in ahead(_tasks(job, shard, reader, rounding)):
            file.write(as_bytes(values))
            progress(values.nbytes)


def _tasks(
    job: Export, shard: list[Output], reader: RowReader, rounding: Rounding
) -> Iterator[Callable[[bytearray], torch.Tensor]]:
    """What to call, in this order, for all values of a file."""
    for output in shard:
        match output.source:
            case Moved(tensor):
                row_bytes = math.prod(output.shape[1:]) * job.checkpoint.tensors[tensor].dtype.itemsize
                for rows in blocks(output.shape[0], row_bytes):
                    yield partial(_read_rows, job, output, output.source, reader, rows)
            case Folded():
                yield partial(_fold, job, output.source, reader, rounding)
            case Zeros():
                yield partial(_zeros, job, output)
            case DrawnGate():
                yield partial(_drawn_gate, job, output, output.source)


def _read_rows(
    job: Export, output: Output, source: Moved, reader: RowReader, rows: tuple[int, int], scratch: bytearray
) -> torch.Tensor:
    """Rows of a tensor, gathered from where they are in Megatron's."""
    stored = job.checkpoint.tensors[source.tensor].dtype
    values = scratch_rows(scratch, stored, (rows[1] - rows[0], *output.shape[1:]))
    position = 0
    for _, first, last in name_table.cut(source.runs, *rows):
        reader.read(source.tensor, source.index, first, last, values[position : position + last - first])
        position += last - first
    if source.scale != 1.0:
        values = values.float() * source.scale  # rounded once, where the dtype cannot hold the product
    return cast(values, job.dtype, f"{job.checkpoint.root}: {source.tensor}")


def _fold(
    job: Export, source: Folded, reader: RowReader, rounding: Rounding, scratch: bytearray
) -> torch.Tensor:
    """A tensor of a layer's gate; with the first, what rounding them changes is added to ``rounding``."""
    assert job.router is not None
    layer = source.layer
    place = job.model.expert_layers.index(layer)
    gate = read_gate(job.checkpoint, job.router, Sizes.of(job.model), place)
    values = cast(gate[source.name], job.dtype, f"{job.checkpoint.root}: the router of layer {layer}")
    if source.name == next(iter(job.gate)):
        tensor = job.stored[name_table.NORM_BEFORE_FFN]
        norm = torch.empty(job.model.hidden_size, dtype=job.checkpoint.tensors[tensor].dtype)
        reader.read(tensor, (layer,), 0, len(norm), norm)
        rounding.add(gate, norm, job.router, layer, job.dtype)
    return values


def _zeros(job: Export, output: Output, scratch: bytearray) -> torch.Tensor:
    return torch.zeros(output.shape, dtype=job.dtype)


def _drawn_gate(job: Export, output: Output, source: DrawnGate, scratch: bytearray) -> torch.Tensor:
    dtype = torch.finfo(job.dtype)
    size = max(source.size, 16 * dtype.smallest_normal * dtype.eps)  # float16 holds little below that
    generator = torch.Generator().manual_seed(source.layer)
    return (torch.randn(output.shape, generator=generator) * size).to(job.dtype)
