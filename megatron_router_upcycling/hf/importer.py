"""Import a Hugging Face folder with a Qwen model, dense or not, as a Megatron torch_dist checkpoint.

No model is built: values are copied from the safetensors files block by block, each to the rows that
``name_table`` gives it. The checkpoint's folder also gets ``model.yaml`` (the model's flags, as the base of a
configuration), ``tokenizer/`` and ``import_hf.json`` (what it was made from).
"""

import itertools
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

from megatron_router_upcycling.checkpoint import beside, names, read_config_json
from megatron_router_upcycling.checkpoint.dense_model import megatron_arguments
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.torch_dist import tensor_in
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion.moe_arguments import DECIDED_LATER, FRESH
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.expert_layers import layer_frequency
from megatron_router_upcycling.files import format_bytes, sha256, versions
from megatron_router_upcycling.hf import files, name_table, safetensors_file
from megatron_router_upcycling.hf.architecture import QwenModel, from_flags
from megatron_router_upcycling.hf.export_job import size_of_half
from megatron_router_upcycling.hf.files import CONFIG, INDEX, SINGLE_FILE, read_json
from megatron_router_upcycling.hf.name_table import BODY, EMBED_TOKENS, IMPORTED, LM_HEAD, Index, Tensor
from megatron_router_upcycling.hf.safetensors_file import DTYPES, Stored, as_bytes, blocks, dtype_name

IGNORED = ".rotary_emb.inv_freq"  # old versions of transformers saved such tensors, and no version reads them
RECORD = "import_hf.json"
MODEL_YAML = "model.yaml"


@dataclass(frozen=True)
class Import:
    """Everything that is known before a byte is written."""

    folder: Path
    out: Path
    flags: dict[str, Any]  # Megatron's flags that build the model
    model: QwenModel
    weights: dict[str, Stored]  # by the names of ``name_table``
    beside: beside.Found  # the other files of ``folder``
    dtype: torch.dtype
    vocabulary_multiple: int  # Megatron's embedding is padded to a multiple of it
    overwrite: bool

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Megatron's arguments for the tokenizer, if the folder holds one."""
        if not beside.is_tokenizer(self.folder):
            return {}
        place = str(self.out.absolute() / beside.FOLDER)
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": place}

    @property
    def bytes_to_write(self) -> int:
        tensors = name_table.tensors(self.model, IMPORTED)
        return sum(math.prod(tensor.shape) for tensor in tensors) * self.dtype.itemsize


def prepare(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    vocabulary_multiple: int = 128,
    overwrite: bool = False,
) -> Import:
    """Read and check all but most values; write nothing. ``dtype``: None for that of the weights."""
    files.refuse_other_folders(folder, "HF_DIR")
    publish.check_target(out, folder, overwrite, source_name="HF_DIR", made_by=RECORD)
    path = folder / CONFIG
    flags = read_config_json.to_flags(read_json(path), path, vocabulary_multiple)
    weights = _read_weights(folder, from_flags(flags))
    flags = _as_trained(flags, weights)
    model = from_flags(flags)
    dtype = dtype or _dtype_of(weights)
    found = beside.look(folder, [*(stored.path for stored in weights.values()), folder / INDEX])
    job = Import(folder, out, flags, model, weights, found, dtype, vocabulary_multiple, overwrite)
    publish.check_space(out, job.bytes_to_write)
    return job


def _read_weights(folder: Path, model: QwenModel) -> dict[str, Stored]:
    """Read the headers of all weight files in ``folder``, and check them against ``model``."""
    found = _all_tensors(folder)
    if model.tied and EMBED_TOKENS not in found and LM_HEAD in found:
        found[EMBED_TOKENS] = found.pop(LM_HEAD)
    shapes = {}
    for name, shape in name_table.hf_tensors(model):
        if name not in found:  # stop early: config.json may ask for a billion
            why = f"which {CONFIG} asks for; the model is incomplete{files.what_else(folder)}"
            if name == LM_HEAD:
                why = f"and {CONFIG} does not tie the output layer to the embedding (tie_word_embeddings)"
            raise UserError(f"{folder}: has no tensor {name}, {why}")
        shapes[name] = shape
    ignored = [IGNORED]
    if model.model_type == "qwen2_moe" and not model.shared_expert_size:
        ignored.append(name_table.within_layer(name_table.SHARED_EXPERT_GATE))  # of an empty expert
    tied_head = {LM_HEAD} & found.keys() if model.tied else set()
    for name in sorted(found.keys() - shapes.keys() - tied_head):
        if not name.endswith(tuple(ignored)) and 0 not in found[name].shape:
            path = found[name].path
            raise UserError(
                f"{path}: {name} is in no {model.family} model of this {CONFIG}; is it quantised?"
            )
    for name in (*shapes, *tied_head):
        stored, shape = found[name], shapes.get(name, shapes[EMBED_TOKENS])
        what = f"{stored.path}: {name} is"
        if stored.shape != shape:
            raise UserError(f"{what} {list(stored.shape)} where {CONFIG} gives {list(shape)}")
        if stored.dtype not in DTYPES:
            raise UserError(f"{what} {stored.dtype}, perhaps quantised; covered: {', '.join(DTYPES)}")
    if tied_head:
        _check_tied(found[LM_HEAD], found[EMBED_TOKENS])
    return {name: found[name] for name in shapes}


def _as_trained(flags: dict[str, Any], weights: dict[str, Stored]) -> dict[str, Any]:
    """``flags`` without what only the class Qwen2-MoE asks for, and ``export_job`` adds for it.

    That is a shared expert of zeros in every layer, or else a gate of the shared expert that is so small that
    its sigmoid is one half.
    """
    model, gate = from_flags(flags), name_table.SHARED_EXPERT_GATE
    if not model.shared_expert_size:
        return flags

    def stored(*parts: name_table.Part) -> Iterator[Stored]:
        return (weights[name_table.name(part, (layer,))] for layer in model.expert_layers for part in parts)

    added: tuple[str, ...] = ()
    if all(_largest(found, 0.0) == 0 for found in stored(*name_table.SHARED_EXPERT)):
        added = ("moe_shared_expert_intermediate_size", "moe_shared_expert_gate")
    else:
        limits = ((found, 16 * size_of_half(DTYPES[found.dtype])) for found in stored(gate))
        if all(0 < _largest(found, limit) < limit for found, limit in limits):
            added = ("moe_shared_expert_gate",)
    return {flag: value for flag, value in flags.items() if flag not in added}


def _largest(stored: Stored, limit: float) -> float:
    """The largest absolute value, or the first one found above ``limit`` in some rows."""
    largest = 0.0
    for rows in blocks(stored.shape, DTYPES[stored.dtype].itemsize):
        largest = max(float(stored.rows(*rows).abs().max()), largest)  # in this order NaN stays
        if not largest <= limit:
            break
    return largest


def _check_tied(head: Stored, embedding: Stored) -> None:
    """Refuse an output layer that was saved despite tied embeddings and differs from the embedding."""
    for rows in blocks(head.shape, DTYPES[head.dtype].itemsize):
        if not head.rows(*rows).view(torch.uint8).equal(embedding.rows(*rows).view(torch.uint8)):
            raise UserError(
                f"{head.path}: {LM_HEAD} differs from {EMBED_TOKENS} though {CONFIG} ties them;"
                " set tie_word_embeddings to false there"
            )


def _dtype_of(weights: dict[str, Stored]) -> torch.dtype:
    """The dtype of all tensors; float32 for float64, in which no training is done."""
    found = {stored.dtype: stored for stored in weights.values()}
    if len(found) > 1:
        both = " and ".join(f"{dtype} ({stored.name} in {stored.path})" for dtype, stored in found.items())
        raise UserError(f"HF_DIR: holds {both}; choose one with --dtype")
    (stored,) = found
    return torch.float32 if stored == "F64" else DTYPES[stored]


def _all_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of all weight files, by the names of ``name_table``."""
    found: dict[str, Stored] = {}
    for file in _files(folder):
        for stored in itertools.chain.from_iterable(
            map(_experts_apart, safetensors_file.read_header(folder / file).values())
        ):
            if other := found.get(stored.name):
                raise UserError(f"{stored.path}: holds {stored.name}, which {other.path} has; remove one")
            found[stored.name] = stored
    # A body saved without its output layer (Qwen3-Embedding) has names without the prefix ``BODY``.
    lacks = "" if any(name.startswith(BODY) for name in found) else BODY
    return {name if name == LM_HEAD else lacks + name: stored for name, stored in found.items()}


def _experts_apart(stored: Stored) -> Iterator[Stored]:
    """``stored``, or the tensors in it where it holds those of all experts of a layer."""
    for ending, parts in name_table.STACKED_EXPERTS.items():
        if stored.name.endswith(ending) and len(stored.shape) == 3 and 0 not in stored.shape:
            experts, rows, columns = stored.shape
            if rows % len(parts):
                break
            shape = (rows // len(parts), columns)
            size = math.prod(shape) * DTYPES.get(stored.dtype, torch.uint8).itemsize
            for place, (expert, part) in enumerate(itertools.product(range(experts), parts)):
                name = stored.name.removesuffix(ending) + name_table.within_layer(part, expert)
                yield Stored(stored.path, name, stored.dtype, shape, stored.offset + place * size)
            return
    yield stored


def _files(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        named = list(places.values()) if isinstance(places, dict) else []
        if not named or not all(isinstance(file, str) and Path(file).name == file for file in named):
            raise UserError(
                f"{folder / INDEX}: its weight_map names no files of this folder; download it again"
            )
        return sorted(set(named))
    found = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))  # without their index
    if not found or found != [files.numbered(number + 1, len(found)) for number in range(len(found))]:
        raise UserError(
            f"HF_DIR {folder}: holds neither {SINGLE_FILE}, {INDEX} nor all of model-...-of-...safetensors;"
            " save or download the model as safetensors, whole"
        )
    return found


def run(job: Import, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its record, or leave nothing. ``progress`` is given bytes written."""
    with publish.new_folder(job.out, job.overwrite) as folder:
        record = _record(job)
        with CheckpointWriter(folder / names.RELEASE, "__0_", progress) as writer:
            _write(job, writer)
        beside.copy(job.folder, job.beside.carried, folder / beside.FOLDER)
        (folder / MODEL_YAML).write_text(_model_yaml(job), encoding="utf-8")
        files.write_json(folder / RECORD, record)
        (folder / names.TRACKER).write_text(names.RELEASE, encoding="utf-8")
    return record


def _record(job: Import) -> dict[str, Any]:
    digests = {
        path.name: {"bytes": path.stat().st_size, "sample_sha256": safetensors_file.sample_digest(path)}
        for path in sorted({stored.path for stored in job.weights.values()})
    }
    source = {"path": str(job.folder.absolute()), "config_sha256": sha256(job.folder / CONFIG)}
    return {
        "format": 1,
        "source": source | {"files": digests},
        "architecture": job.model.describe(),
        "left_out": job.beside.left_out,
        "dtype": dtype_name(job.dtype),
        "model": job.flags,
        "versions": versions(),
    }


def _write(job: Import, writer: CheckpointWriter) -> None:
    model = job.model
    for key, shape, offset, values, checksum in safetensors_file.ahead(_tasks(job)):
        writer.write_chunk(key, shape, values, [offset], checksum=checksum)
    with_experts = (None, *model.expert_layers) if model.num_experts else ()
    for key in list(writer.tensors):  # the norms before experts, whose name depends on Transformer Engine
        if (other := names.other_norm(key)) and names.split_key(key)[1] in with_experts:
            writer.tensors[other] = writer.tensors[key]
    empty = writer.write_object(torch_save_file.dump([None]))
    layers = tuple(model.expert_layers) if model.layers_differ else None
    shared = bool(model.shared_expert_size)
    for name in names.extra_states(model.num_layers, model.num_experts, model.qk_norm, shared, layers):
        writer.objects[name] = empty
    of_run = {
        "params_dtype": job.dtype,
        "make_vocab_size_divisible_by": job.vocabulary_multiple,
        "bf16": job.dtype == torch.bfloat16,
    }
    args = vars(megatron_arguments(job.flags)) | of_run | job.tokenizer
    if model.num_experts:
        frequency = layer_frequency(job.flags.get("moe_layer_freq", 1))
        unset = dict.fromkeys(("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size"))
        args = unset | args | FRESH | {"moe_layer_freq": frequency}
        args = {name: value for name, value in args.items() if name not in DECIDED_LATER}
    common = {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    writer.objects[COMMON_STATE] = writer.write_object(torch_save_file.dump([common]))
    writer.finish()


# Key and shape of a Megatron tensor, and the offset, values and CRC-32 of some of its rows.
type Block = tuple[str, Index, Index, torch.Tensor, int]


def _tasks(job: Import) -> Iterator[Callable[[bytearray], Block]]:
    """The calls that read all blocks of the checkpoint, in order."""
    for tensor in name_table.tensors(job.model, IMPORTED):
        for layer in tensor.layers:
            for index, _ in tensor.places(layer):
                for rows in blocks(tensor.shape[len(index) :], job.dtype.itemsize):
                    yield partial(_read_block, job, tensor, index, *rows)


def _read_block(
    job: Import, tensor: Tensor, index: Index, start: int, stop: int, scratch: bytearray
) -> Block:
    """Rows ``start`` .. ``stop`` of ``tensor`` at ``index``, gathered from its Hugging Face tensors."""
    parts = [job.weights[name_table.name(part, index)] for part in tensor.parts]
    where = f"{parts[0].path}: {' and '.join(part.name for part in parts)}"
    columns = tensor.shape[len(index) + 1 :]
    values = tensor_in(scratch, job.dtype, (stop - start, *columns))
    ranges = [(first, last) for _, first, last in tensor.segments]
    for number, first, last, place in name_table.cut(ranges, start, stop):
        part, *_ = tensor.segments[number]
        target = values[place : place + last - first]
        if part is None:
            target.zero_()
        else:
            target.copy_(safetensors_file.cast(parts[part].rows(first, last), job.dtype, where))
    if (scale := name_table.scale(tensor, job.model)) != 1.0:
        values /= scale
    key, shape = tensor.name, tensor.shape
    if job.model.layers_differ and index:
        key, shape, index = names.at_layer(key, index[0]), shape[1:], index[1:]
    offset = (*index, start, *(0 for _ in columns))
    return key, shape, offset, values[(None,) * len(index)], zlib.crc32(as_bytes(values))


def _model_yaml(job: Import) -> str:
    entries = job.flags | job.tokenizer
    if job.tokenizer:
        entries["tokenizer_model"] = beside.FOLDER  # relative to this file, so that both can be moved
    entries["make_vocab_size_divisible_by"] = job.vocabulary_multiple
    if job.dtype == torch.bfloat16:
        entries["bf16"] = True
    return (
        f"# {job.folder.absolute().name}, as Megatron's arguments. Build a configuration on it with\n"
        f"# base: {MODEL_YAML}, or give it as --config beside flags for data and training.\n"
        + yaml.safe_dump(entries, sort_keys=False)
    )


def describe_result(job: Import, record: dict[str, Any], seconds: float) -> str:
    """What was made, and what to run next."""
    size, flags = format_bytes(job.bytes_to_write), job.out / MODEL_YAML
    left_out = f"left out: {', '.join(job.beside.left_out)}\n" if job.beside.left_out else ""
    tokenizer = "" if job.tokenizer else " --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER"
    what, where = (
        ("pretrain", "--save RUN") if job.model.num_experts else ("collect_keys", "--output KEY_STATS")
    )
    return (
        f"{job.out}: {record['architecture']}, {record['dtype']}, {size} in {seconds:.1f} s\n{left_out}"
        f"the model's flags: {flags}\n"
        f"next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.{what}"
        f" --config {flags} --load {job.out} {where}{tokenizer} [flags for data]"
    )
