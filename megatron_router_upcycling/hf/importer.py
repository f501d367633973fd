"""A Hugging Face folder with a dense Qwen model into a Megatron torch_dist checkpoint.

No model is built: values go from the safetensors files to the checkpoint block by block, each to the rows
that ``name_table`` gives it. Beside the checkpoint come ``model.yaml`` (the model's flags, to build a
configuration on), ``tokenizer/`` and ``import_hf.json`` (what it was made from).
"""

import json
import math
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_router_upcycling.checkpoint import beside, read_config_json
from megatron_router_upcycling.checkpoint.dense_model import megatron_arguments
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE, TRACKER
from megatron_router_upcycling.checkpoint.names import extra_states
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.torch_dist import tensor_in
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import format_bytes, sha256, versions
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel, from_flags
from megatron_router_upcycling.hf.files import CONFIG, INDEX, read_json, refuse_other_folders
from megatron_router_upcycling.hf.name_table import Index, Tensor
from megatron_router_upcycling.hf.safetensors_file import (
    ahead,
    as_bytes,
    blocks,
    cast,
    dtype_name,
    sample_digest,
)
from megatron_router_upcycling.hf.weights import Weights, choose_dtype, read_weights

RECORD = "import_hf.json"
MODEL_YAML = "model.yaml"


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype | None = None
    vocabulary_multiple: int = 128
    overwrite: bool = False


@dataclass(frozen=True)
class Import:
    """Everything that is known before a byte is written."""

    folder: Path
    out: Path
    flags: dict[str, Any]  # Megatron's, that build the model
    model: QwenModel
    weights: Weights
    beside: beside.Found  # the other files of ``folder``
    dtype: torch.dtype
    options: Options

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Megatron's arguments for the tokenizer, if the folder holds one."""
        if not beside.is_tokenizer(self.folder):
            return {}
        place = str(self.out.absolute() / beside.FOLDER)
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": place}

    @property
    def bytes_to_write(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in name_table.tensors(self.model)) * self.dtype.itemsize


def prepare(folder: Path, out: Path, options: Options) -> Import:
    """Read and check everything but the values; write nothing."""
    refuse_other_folders(folder)
    publish.check_target(out, folder, options.overwrite, source_name="HF_DIR", made_by=RECORD)
    path = folder / CONFIG
    flags = read_config_json.to_flags(read_json(path), path, options.vocabulary_multiple)
    model = from_flags(flags)
    weights = read_weights(folder, model)
    dtype = choose_dtype(weights, options.dtype)
    found = beside.look(folder, [*weights.paths, folder / INDEX])
    job = Import(folder, out, flags, model, weights, found, dtype, options)
    publish.check_space(out, job.bytes_to_write)
    return job


def run(job: Import, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its record. On any exception nothing is left behind.

    ``progress`` is called with the number of bytes after each write.
    """
    try:
        with publish.new_folder(job.out, job.options.overwrite) as folder:
            record = _record(job)
            with CheckpointWriter(folder / "release", "__0_", progress) as writer:
                _write(job, writer)
            beside.copy(job.folder, job.beside.carried, folder / beside.FOLDER)
            (folder / MODEL_YAML).write_text(_model_yaml(job), encoding="utf-8")
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (folder / TRACKER).write_text("release", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"OUT {job.out}: cannot be written ({error.strerror}); nothing was left behind"
        ) from None
    return record


def _record(job: Import) -> dict[str, Any]:
    """What the checkpoint is made from."""
    return {
        "format": 1,
        "source": {
            "path": str(job.folder.absolute()),
            "config_sha256": sha256(job.folder / CONFIG),
            "files": {
                path.name: {"bytes": path.stat().st_size, "sample_sha256": sample_digest(path)}
                for path in job.weights.paths
            },
        },
        "architecture": job.model.describe(),
        "left_out": job.beside.left_out,
        "dtype": dtype_name(job.dtype),
        "model": job.flags,
        "versions": versions(),
    }


def _write(job: Import, writer: CheckpointWriter) -> None:
    for tensor, offset, values, checksum in ahead(_tasks(job)):
        writer.write_chunk(tensor.name, tensor.shape, values, [offset], checksum=checksum)
    empty = writer.write_object(torch_save_file.dump([None]))
    for name in extra_states(job.model.num_layers, 0, qk_layernorm=job.model.qk_norm):
        writer.objects[name] = empty
    of_run = {
        "params_dtype": job.dtype,
        "make_vocab_size_divisible_by": job.options.vocabulary_multiple,
        "bf16": job.dtype == torch.bfloat16,
    }
    common = {
        "args": Namespace(**vars(megatron_arguments(job.flags)) | of_run | job.tokenizer),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    writer.objects[COMMON_STATE] = writer.write_object(torch_save_file.dump([common]))
    writer.finish()


# A tensor of Megatron's, and rows of it with their offset and their CRC-32.
type Block = tuple[Tensor, Index, torch.Tensor, int]


def _tasks(job: Import) -> Iterator[Callable[[bytearray], Block]]:
    """What to call, in this order, for all blocks of the checkpoint."""
    for tensor in name_table.tensors(job.model):
        for layer in tensor.layers:
            for index, _ in tensor.places(layer):
                for rows in blocks(tensor.shape[len(index) :], job.dtype.itemsize):
                    yield partial(_read_block, job, tensor, index, *rows)


def _read_block(
    job: Import, tensor: Tensor, index: Index, start: int, stop: int, scratch: bytearray
) -> Block:
    """The rows ``start`` .. ``stop`` of what ``tensor`` has at ``index``, each read to where it belongs."""
    parts = [job.weights.tensors[name_table.name(part, index)] for part in tensor.parts]
    where = f"{parts[0].path}: {' and '.join(part.name for part in parts)}"
    columns = tensor.shape[len(index) + 1 :]
    values = tensor_in(scratch, job.dtype, (stop - start, *columns))
    ranges = [(segment.start, segment.stop) for segment in tensor.segments]
    for number, first, last, place in name_table.cut(ranges, start, stop):
        part = tensor.segments[number].part
        target = values[place : place + last - first]
        if part is None:
            target.zero_()
        else:
            target.copy_(cast(parts[part].rows(first, last), job.dtype, where))
    offset = (*index, start, *(0 for _ in columns))
    return tensor, offset, values[(None,) * len(index)], zlib.crc32(as_bytes(values))


def _model_yaml(job: Import) -> str:
    entries = job.flags | job.tokenizer
    if job.tokenizer:
        entries["tokenizer_model"] = beside.FOLDER  # beside this file, wherever it is moved
    entries |= {"make_vocab_size_divisible_by": job.options.vocabulary_multiple}
    if job.dtype == torch.bfloat16:
        entries |= {"bf16": True}
    return (
        f"# {job.folder.absolute().name}, as Megatron's arguments. Build a configuration on it with\n"
        f"# base: {MODEL_YAML}, or give it as --config beside flags for data and training.\n"
        + yaml.safe_dump(entries, sort_keys=False)
    )


def describe_result(job: Import, record: dict[str, Any], seconds: float) -> str:
    """What was made, and what to run next."""
    size = format_bytes(job.bytes_to_write)
    left_out = f"left out: {', '.join(job.beside.left_out)}\n" if job.beside.left_out else ""
    tokenizer = "" if job.tokenizer else " --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER"
    return (
        f"{job.out}: {record['architecture']}, {record['dtype']}, {size} in {seconds:.1f} s\n{left_out}"
        f"the model's flags: {job.out / MODEL_YAML}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys"
        f" --config {job.out / MODEL_YAML} --load {job.out} --output KEY_STATS{tokenizer} [flags for data]"
    )
