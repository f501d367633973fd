"""A Hugging Face folder of a dense Qwen model into a Megatron torch_dist checkpoint.

No model is built: values go from the safetensors files to the checkpoint block by block, each to the rows
that ``names`` gives it. Beside the checkpoint come ``model.yaml`` (the model's flags, to build a
configuration on), ``tokenizer/`` and ``import_hf.json`` (what it was made from).
"""

import itertools
import json
import math
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE, TRACKER
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import format_bytes, sha256, versions
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import Architecture, from_hf
from megatron_router_upcycling.hf.files import (
    BESIDE_TOKENIZER,
    CONFIG,
    INDEX,
    SINGLE_FILE,
    TOKENIZER,
    TOKENIZER_FILES,
    copy_files,
    is_tokenizer,
    read_json,
)
from megatron_router_upcycling.hf.name_table import Row
from megatron_router_upcycling.hf.safetensors_file import DTYPES, SafetensorsFile
from megatron_router_upcycling.hf.values import (
    ahead,
    as_bytes,
    blocks,
    cast,
    check_finite,
    dtype_name,
    scratch_rows,
)

RECORD = "import_hf.json"
MODEL_YAML = "model.yaml"

# Tensors that old versions of transformers saved and no version reads.
IGNORED = ".rotary_emb.inv_freq"
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
    model: Architecture
    dtype: torch.dtype
    options: Options
    files: dict[str, Path]  # tensor -> the file that holds it

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Megatron's arguments for the tokenizer, if the folder holds one."""
        if not is_tokenizer(self.folder):
            return {}
        place = str(self.out.absolute() / TOKENIZER)
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
    config = read_json(path)
    model = from_hf(config, path, options.vocabulary_multiple)
    files = _find_tensors(folder)
    dtype = _check_tensors(folder, model, files, options.dtype)
    job = Import(folder, out, model, dtype, options, files)
    publish.check_space(out, job.bytes_to_write)
    return job


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> file, of all safetensors files that belong to the model."""
    promised: dict[str, str] = {}
    if (folder / SINGLE_FILE).is_file():
        shards = [SINGLE_FILE]
    elif (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map") or {}
        if not isinstance(promised, dict) or not all(isinstance(file, str) for file in promised.values()):
            raise UserError(f"{folder / INDEX}: its weight_map names no files; download it again")
        if not promised:
            raise UserError(f"{folder / INDEX}: has no weight_map; download it again")
        shards = sorted(set(promised.values()))
    else:
        raise UserError(f"HF_DIR {folder}: holds neither {SINGLE_FILE} nor {INDEX}; save it as safetensors")
    files: dict[str, Path] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{folder / INDEX}: names {shard!r}, which is no file of this folder")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: missing, though {INDEX} names it; download it again")
        with SafetensorsFile(folder / shard) as file:
            for tensor in file.entries:
                if tensor in files:
                    raise UserError(f"{folder / shard}: holds {tensor}, as does {files[tensor].name}")
                files[tensor] = folder / shard
    for tensor, shard in promised.items():
        if files.get(tensor) != folder / shard:
            raise UserError(f"{folder / shard}: has no {tensor}, though {INDEX} says so; download it again")
    return files


def _check_tensors(
    folder: Path, model: Architecture, files: dict[str, Path], asked: torch.dtype | None
) -> torch.dtype:
    """Compare the tensors with the architecture; return the dtype to write.

    Raises:
        UserError: one is missing, not expected, of another shape, or of a dtype that is not covered.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for tensor, shape in name_table.hf_tensors(model):
        expected[tensor] = shape
        if tensor not in files:
            raise UserError(
                f"{folder}: has no tensor {tensor}, which {CONFIG} asks for; the model is incomplete"
            )
    found: dict[str, str] = {}  # dtype -> one of its tensors
    for path in sorted(set(files.values())):
        with SafetensorsFile(path) as file:
            for tensor, entry in file.entries.items():
                if tensor.endswith(IGNORED) or (model.tied and tensor == LM_HEAD):
                    continue
                if tensor not in expected:
                    raise UserError(f"{path}: holds {tensor}, which no {model.family} model of {CONFIG} has")
                if entry.shape != expected[tensor]:
                    given = list(expected[tensor])
                    raise UserError(f"{path}: {tensor} is {list(entry.shape)} where {CONFIG} gives {given}")
                if entry.dtype not in DTYPES:
                    raise UserError(
                        f"{path}: {tensor} is {entry.dtype}, perhaps quantised; covered: {', '.join(DTYPES)}"
                    )
                found.setdefault(entry.dtype, tensor)
    if asked is None and len(found) > 1:
        both = " and ".join(f"{dtype} ({tensor})" for dtype, tensor in found.items())
        raise UserError(f"{folder}: holds {both}; choose one with --dtype")
    return asked or DTYPES[next(iter(found))]


def run(job: Import, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its record. On any exception nothing is left behind.

    Args:
        progress: called with the number of bytes after each write.

    Raises:
        UserError: it cannot be written, or the values are damaged.
    """
    try:
        with publish.new_folder(job.out, job.options.overwrite) as folder:
            with ExitStack() as stack, CheckpointWriter(folder / "release", "__0_", progress) as writer:
                paths = set(job.files.values())
                sources = {path: stack.enter_context(SafetensorsFile(path)) for path in paths}
                files = {
                    path.name: {"bytes": source.size, "sample_sha256": source.sample_digest()}
                    for path, source in sorted(sources.items())
                }
                _check_tied(job, sources)
                _write(job, sources, writer)
            if job.tokenizer:
                (folder / TOKENIZER).mkdir()
                copy_files(job.folder, folder / TOKENIZER, (*TOKENIZER_FILES, *BESIDE_TOKENIZER))
            _write_yaml(job, folder / MODEL_YAML)
            record = {
                "format": 1,
                "source": {
                    "path": str(job.folder.absolute()),
                    "config_sha256": sha256(job.folder / CONFIG),
                    "files": files,
                },
                "architecture": job.model.describe(),
                "dtype": dtype_name(job.dtype),
                "model": job.model.megatron_flags(),
                "versions": versions(),
            }
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (folder / TRACKER).write_text("release", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"OUT {job.out}: cannot be written ({error.strerror}); nothing was left behind"
        ) from None
    return record


def _write(job: Import, sources: dict[Path, SafetensorsFile], writer: CheckpointWriter) -> None:
    for block in ahead(_tasks(job, sources)):
        writer.write_chunk(block.key, block.shape, block.values, [block.offset], checksum=block.checksum)
    empty = writer.write_object(torch_save_file.dump([None]))
    for key in _extra_states(job.model):
        writer.add_object(key, empty)
    common = {
        "args": Namespace(**vars(job.model.megatron_args()) | job.tokenizer),
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

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    values: torch.Tensor
    checksum: int


def _tasks(job: Import, sources: dict[Path, SafetensorsFile]) -> Iterator[Callable[[bytearray], Block]]:
    """What to call, in this order, for all blocks of the checkpoint."""
    for row in name_table.rows(job.model):
        shape = name_table.megatron_shape(row, job.model)
        for index in name_table.indices(row, job.model):
            width = math.prod(shape[len(index) + 1 :])
            for rows in blocks(shape[len(index)], width * job.dtype.itemsize):
                yield partial(_read_block, job, sources, row, index, rows)


def _read_block(
    job: Import,
    sources: dict[Path, SafetensorsFile],
    row: Row,
    index: tuple[int, ...],
    rows: tuple[int, int],
    scratch: bytearray,
) -> Block:
    """Rows of Megatron's tensor at a place of its stack, each read at once to where it belongs."""
    parts = [name_table.name(part, index) for part in row.parts]
    files = [sources[job.files[part]] for part in parts]
    where = f"{files[0].path}: {' and '.join(parts)}"
    whole = name_table.megatron_shape(row, job.model)
    columns = whole[len(index) + 1 :]
    width = math.prod(columns)
    values = scratch_rows(scratch, job.dtype, (rows[1] - rows[0], *columns))
    segments = name_table.segments(row, job.model)
    position = 0
    for number, first, last in name_table.cut([(start, stop) for _, start, stop in segments], *rows):
        part = segments[number].part
        target = values[position : position + last - first]
        position += last - first
        if part is None:
            target.zero_()
            continue
        stored = DTYPES[files[part].entries[parts[part]].dtype]
        plain = target if stored == job.dtype else torch.empty(target.shape, dtype=stored)
        files[part].read(parts[part], first * width * stored.itemsize, as_bytes(plain))
        if plain is not target:
            target.copy_(cast(plain, job.dtype, where))
    check_finite(values, where)
    offset = (*index, rows[0], *(0 for _ in columns))
    stacked = values[(None,) * len(index)]
    return Block(row.megatron, whole, offset, stacked, zlib.crc32(as_bytes(values)))


def _check_tied(job: Import, sources: dict[Path, SafetensorsFile]) -> None:
    """Where embeddings are tied and the output layer was saved all the same, it must be the embedding."""
    if not job.model.tied or LM_HEAD not in job.files:
        return
    head, embedding = (sources[job.files[tensor]] for tensor in (LM_HEAD, EMBEDDING))
    same = head.entries[LM_HEAD].length == embedding.entries[EMBEDDING].length
    for start, stop in blocks(head.entries[LM_HEAD].length, 1) if same else ():
        left, right = bytearray(stop - start), bytearray(stop - start)
        head.read(LM_HEAD, start, memoryview(left))
        embedding.read(EMBEDDING, start, memoryview(right))
        same = same and left == right
    if not same:
        raise UserError(
            f"{head.path}: {LM_HEAD} differs from {EMBEDDING} though {CONFIG} ties them;"
            " set tie_word_embeddings to false there"
        )


def _extra_states(model: Architecture) -> list[str]:
    """Keys of the empty entries that a dense model looks for, with or without Transformer Engine."""
    modules = ["self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] * model.qk_norm
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    L = model.num_layers
    layers = itertools.product(range(L), modules)
    return ["decoder.final_layernorm._extra_state/shard_0_1"] + [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{L}" for layer, module in layers
    ]


def _write_yaml(job: Import, path: Path) -> None:
    entries = job.model.megatron_flags() | job.tokenizer
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
    return (
        f"{job.out}: {record['architecture']}, {record['dtype']}, {size} in {seconds:.1f} s\n"
        f"the model's flags: {job.out / MODEL_YAML}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys"
        f" --config {job.out / MODEL_YAML} --load {job.out} --output KEY_STATS [flags for data]"
    )
