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
from megatron_router_upcycling.hf.name_table import Row
from megatron_router_upcycling.hf.safetensors_file import (
    ahead,
    as_bytes,
    blocks,
    cast,
    check_finite,
    dtype_name,
    sample_digest,
)
from megatron_router_upcycling.hf.weights import Weights

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
        return name_table.num_elements(self.model) * self.dtype.itemsize


def prepare(folder: Path, out: Path, options: Options) -> Import:
    """Read and check everything but the values; write nothing.

    Raises:
        UserError: whatever would make the import fail and can be known beforehand.
    """
    if not folder.is_dir():
        raise UserError(f"HF_DIR {folder}: no such folder; name the folder of a model's {CONFIG}")
    publish.check_target(out, folder, options.overwrite, source_name="HF_DIR", made_by=RECORD)
    path = folder / CONFIG
    refuse_other_folders(folder, "HF_DIR")
    flags = read_config_json.to_flags(read_json(path), path, options.vocabulary_multiple)
    model = from_flags(flags)
    weights = Weights.open(folder)
    dtype = weights.choose_dtype(model, options.dtype)
    found = beside.look(folder, [*weights.paths, folder / INDEX])
    job = Import(folder, out, flags, model, weights, found, dtype, options)
    publish.check_space(out, job.bytes_to_write)
    return job


def run(job: Import, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its record. On any exception nothing is left behind.

    Args:
        progress: called with the number of bytes after each write.
    """
    try:
        with publish.new_folder(job.out, job.options.overwrite) as folder:
            record = _record(job)
            job.weights.check_tied(job.model)
            with CheckpointWriter(folder / "release", "__0_", progress) as writer:
                _write(job, writer)
            beside.copy(job.folder, job.beside.carried, folder / beside.FOLDER)
            _write_yaml(job, folder / MODEL_YAML)
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
        "left_out": list(job.beside.left_out),
        "dtype": dtype_name(job.dtype),
        "model": job.flags,
        "versions": versions(),
    }


def _write(job: Import, writer: CheckpointWriter) -> None:
    for block in ahead(_tasks(job)):
        writer.write_chunk(block.name, block.shape, block.values, [block.offset], checksum=block.checksum)
    empty = writer.write_object(torch_save_file.dump([None]))
    for name in extra_states(job.model.num_layers, 0, qk_layernorm=job.model.qk_norm):
        writer.add_object(name, empty)
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
    writer.add_object(COMMON_STATE, writer.write_object(torch_save_file.dump([common])))
    writer.finish()


@dataclass(frozen=True)
class Block:
    """Rows of a Megatron tensor, ready to be written."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    values: torch.Tensor
    checksum: int


def _tasks(job: Import) -> Iterator[Callable[[bytearray], Block]]:
    """What to call, in this order, for all blocks of the checkpoint."""
    for row in name_table.rows(job.model):
        shape = name_table.megatron_shape(row, job.model)
        for index in name_table.indices(row, job.model):
            width = math.prod(shape[len(index) + 1 :])
            for rows in blocks(shape[len(index)], width * job.dtype.itemsize):
                yield partial(_read_block, job, row, index, rows)


def _read_block(
    job: Import, row: Row, index: tuple[int, ...], rows: tuple[int, int], scratch: bytearray
) -> Block:
    """Rows of Megatron's tensor at a place of its stack, each read to where it belongs."""
    parts = [name_table.name(part, index) for part in row.parts]
    tensors = [job.weights.find(part, job.model) for part in parts]
    where = f"{tensors[0].file.path}: {' and '.join(tensor.name for tensor in tensors)}"
    shape = name_table.megatron_shape(row, job.model)
    columns = shape[len(index) + 1 :]
    values = tensor_in(scratch, job.dtype, (rows[1] - rows[0], *columns))
    segments = name_table.segments(row, job.model)
    position = 0
    for number, first, last in name_table.cut([(start, stop) for _, start, stop in segments], *rows):
        part = segments[number].part
        target = values[position : position + last - first]
        position += last - first
        if part is None:
            target.zero_()
            continue
        stored = tensors[part].rows(first, last)
        target.copy_(stored if stored.dtype == job.dtype else cast(stored, job.dtype, where))
    check_finite(values, where)
    offset = (*index, rows[0], *(0 for _ in columns))
    stacked = values[(None,) * len(index)]
    return Block(row.megatron, shape, offset, stacked, zlib.crc32(as_bytes(values)))


def _write_yaml(job: Import, path: Path) -> None:
    entries = job.flags | job.tokenizer
    if job.tokenizer:
        entries["tokenizer_model"] = beside.FOLDER  # beside this file, wherever it is moved
    entries |= {"make_vocab_size_divisible_by": job.options.vocabulary_multiple}
    if job.dtype == torch.bfloat16:
        entries |= {"bf16": True}
    path.write_text(
        f"# {job.folder.absolute().name}, as Megatron's arguments. Build a configuration on it with\n"
        f"# base: {MODEL_YAML}, or give it as --config beside flags for data and training.\n"
        + yaml.safe_dump(entries, sort_keys=False),
        encoding="utf-8",
    )


def describe_result(job: Import, record: dict[str, Any], seconds: float) -> str:
    """What was made, and what to run next."""
    size = format_bytes(job.bytes_to_write)
    left_out = f"left out: {', '.join(job.beside.left_out)}\n" if job.beside.left_out else ""
    left_out += "".join(f"{line}\n" for line in _warnings(job))
    tokenizer = "" if job.tokenizer else " --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER"
    return (
        f"{job.out}: {record['architecture']}, {record['dtype']}, {size} in {seconds:.1f} s\n{left_out}"
        f"the model's flags: {job.out / MODEL_YAML}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys"
        f" --config {job.out / MODEL_YAML} --load {job.out} --output KEY_STATS{tokenizer} [flags for data]"
    )


def _warnings(job: Import) -> Iterator[str]:
    """What the user should know of the model before training it."""
    if job.dtype == torch.float16:
        yield "float16 weights: training is in float32, or in bfloat16 with --bf16"
    if not job.tokenizer:
        yield f"no tokenizer in {job.folder}: name the model's with --tokenizer-model"
    path = job.folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = [token.get("id", 0) for token in content.get("added_tokens") or []]
        ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        if (largest := max(ids, default=0)) >= job.model.vocab_size:
            yield (
                f"warning: the tokenizer has tokens up to {largest} and the model {job.model.vocab_size} of"
                " them: data with tokens beyond will be refused"
            )
