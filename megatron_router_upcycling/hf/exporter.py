"""A Megatron checkpoint, dense or Mixture-of-Experts, into a Hugging Face folder.

A dense model becomes ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``, a Mixture-of-Experts whose router folds
into one linear gate ``Qwen2MoeForCausalLM`` or ``Qwen3MoeForCausalLM``: stock classes, which transformers,
vLLM and SGLang load without code of ours. Values are streamed, block by block.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling import files
from megatron_router_upcycling.checkpoint.layers import stack_layers
from megatron_router_upcycling.checkpoint.names import ROUTER, TRAINING_STATE
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.rows import RowReader
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync, versions
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import Architecture, from_megatron
from megatron_router_upcycling.hf.export_job import Export, Folded, Moved, Options, Output, Zeros, class_name
from megatron_router_upcycling.hf.files import find_tokenizer, shard_name
from megatron_router_upcycling.hf.folder import RECORD, write_folder
from megatron_router_upcycling.hf.name_table import Part, Row
from megatron_router_upcycling.hf.rounding import Rounding, read_gate
from megatron_router_upcycling.hf.safetensors_file import format_header
from megatron_router_upcycling.hf.values import ahead, as_bytes, blocks, cast, dtype_name, scratch_rows
from megatron_router_upcycling.routers import kinds

EMBEDDING = "embedding.word_embeddings.weight"


def prepare(root: Path, out: Path, options: Options) -> Export:
    """Read and check everything but the values; write nothing.

    Raises:
        UserError: whatever would make the export fail and can be known beforehand.
    """
    checkpoint = open_checkpoint(root)
    publish.check_target(out, root, options.overwrite, source_name="MOE", made_by=RECORD)
    if EMBEDDING not in checkpoint.tensors:
        raise UserError(f"{root}: has no tensor {EMBEDDING}; export-hf takes a GPT model")
    model = from_megatron(checkpoint.args, root, checkpoint.tensors[EMBEDDING].shape[0])
    checkpoint = stack_layers(checkpoint)
    recorded = manifest.read(root)
    router = _router(checkpoint, recorded, model) if model.num_experts else None
    gate = kinds.gate_shapes(router, kinds.Sizes.of(model)) if router else None
    if options.shared_expert_width < 0:
        raise UserError(f"--shared-expert-width {options.shared_expert_width}: must be 0 or more")
    keys = _check_tensors(checkpoint, model, router)
    outputs = list(_outputs(model, gate, keys, options))
    dtype = options.dtype or checkpoint.tensors[keys[name_table.ANY_PROJECTION]].dtype
    job = Export(
        checkpoint=checkpoint,
        out=out,
        model=model,
        router=router,
        gate=gate,
        dtype=dtype,
        tokenizer=find_tokenizer(options.tokenizer, checkpoint),
        options=options,
        keys=keys,
        shards=_shards(outputs, dtype, options.max_shard_bytes),
        manifest=recorded,
    )
    if not job.is_stock and not options.modelling_code:
        raise UserError(_why_not_stock(job))
    publish.check_space(out, job.bytes_to_write)
    return job


def _router(checkpoint: Checkpoint, recorded: dict[str, Any] | None, model: Architecture) -> RouterConfig:
    """The router that the manifest records; without one, Megatron's own linear router.

    Raises:
        UserError: the manifest and the training arguments contradict each other.
    """
    args = checkpoint.args
    trained = {"top_k": args.moe_router_topk, "pre_softmax": bool(args.moe_router_pre_softmax)}
    if recorded is None:
        return RouterConfig(router="linear", num_experts=model.num_experts, **trained)
    router = manifest.router_config(recorded, checkpoint.root / manifest.NAME)
    for name, value in (trained | {"num_experts": model.num_experts}).items():
        if getattr(router, name) != value:
            raise UserError(
                f"{checkpoint.root / manifest.NAME}: {name} {getattr(router, name)}, but the model was"
                f" trained with {value}; put the manifest of that training there"
            )
    return router


def _check_tensors(
    checkpoint: Checkpoint, model: Architecture, router: RouterConfig | None
) -> dict[str, str]:
    """Compare the checkpoint's tensors with the architecture; return the name it has for each row.

    Raises:
        UserError: one is missing, has another shape, or has no place in a Hugging Face folder.
    """
    root, stored = checkpoint.root, checkpoint.tensors
    expected, keys, spare = _router_shapes(router, model), {}, set()
    for row in name_table.rows(model):
        # Where both names are there, as convert leaves them, they are the same bytes.
        key = row.megatron if row.other is None or row.megatron in stored else row.other
        keys[row.megatron] = key
        spare |= {row.other, row.megatron}
        expected[key] = name_table.megatron_shape(row, model)
    for key, shape in expected.items():
        if key not in stored:
            raise UserError(f"{root}: has no tensor {key}, which its training arguments ask for")
        if stored[key].shape != shape:
            raise UserError(
                f"{root}: {key} is {list(stored[key].shape)} where the training arguments give {list(shape)}"
            )
    for key in stored:
        if key not in expected and key not in spare and not TRAINING_STATE.match(key):
            raise UserError(f"{root}: holds {key}, which has no place in a {model.family} model")
    return keys


def _router_shapes(router: RouterConfig | None, model: Architecture) -> dict[str, tuple[int, ...]]:
    """The routers' tensors over all layers, by their names in Megatron."""
    if router is None:
        return {}
    own = router.kind.parameters(router, kinds.Sizes.of(model))
    return {f"{ROUTER}.{parameter.name}": (model.num_layers, *parameter.shape) for parameter in own}


def _outputs(
    model: Architecture, gate: dict[str, tuple[int, ...]] | None, keys: dict[str, str], options: Options
) -> Iterator[Output]:
    """Every tensor of the folder, in the order of the model."""
    rows = name_table.rows(model)
    before = [row for row in rows if row.megatron == EMBEDDING]
    after = [row for row in rows if not name_table.stack(row, model) and row not in before]

    def moved(row: Row, index: tuple[int, ...]) -> Iterator[Output]:
        for number, part in enumerate(row.parts):
            runs = tuple(name_table.runs(row, number, model))
            name, shape = name_table.name(part, index), name_table.shape(part, model)
            yield Output(name, shape, Moved(keys[row.megatron], index, runs))

    for row in before:
        yield from moved(row, ())
    for layer in range(model.num_layers):
        for row in rows:
            for index in name_table.indices(row, model):
                if index and index[0] == layer:
                    yield from moved(row, index)
        if gate is not None:
            for name, shape in gate.items():
                yield Output(f"{name_table.GATE.format(layer=layer)}.{name}", shape, Folded(layer, name))
            if model.family == "qwen2":
                yield from _shared_expert(model, layer, options.shared_expert_width)
    for row in after:
        yield from moved(row, ())


def _shared_expert(model: Architecture, layer: int, width: int) -> Iterator[Output]:
    parts: tuple[Part, ...] = (name_table.SHARED_EXPERT_GATE,)
    if width:
        parts = (*name_table.SHARED_EXPERT, *parts)
    for part in parts:
        sizes = {"S": width, "D": model.hidden_size, "1": 1}
        shape = tuple(sizes[symbol] for symbol in part.shape)
        yield Output(name_table.name(part, (layer,)), shape, Zeros())


def _shards(outputs: list[Output], dtype: torch.dtype, limit: int) -> list[list[Output]]:
    """``outputs`` in files of at most ``limit`` bytes, or of one tensor that is larger."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.num_bytes(dtype) > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.num_bytes(dtype)
    return shards


def _why_not_stock(job: Export) -> str:
    assert job.router is not None
    why = job.router.kind.not_stock(job.router)
    return (
        f"MOE {job.checkpoint.root}: its router {why}, which no stock class computes; pass --modelling-code"
        " to write a modelling file beside the weights, which is loaded with trust_remote_code"
    )


def run(job: Export, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the folder and return its record. On any exception nothing is left behind.

    Args:
        progress: called with the number of bytes after each write.

    Raises:
        UserError: it cannot be written, or a data file or a value is damaged.
    """
    rounding = Rounding() if job.router else None
    try:
        with (
            publish.new_folder(job.out, job.options.overwrite) as folder,
            RowReader(job.checkpoint) as reader,
            ThreadPoolExecutor(1) as aside,
        ):
            flushed = []
            for number, shard in enumerate(job.shards, start=1):
                path = folder / shard_name(number, len(job.shards))
                with open(path, "xb") as file:
                    _write_shard(job, shard, reader, file, rounding, progress)
                flushed.append(aside.submit(sync, path))
            record = _record(job, rounding)
            write_folder(job, folder, record)
            for flush in flushed:
                flush.result()
    except OSError as error:
        raise UserError(
            f"OUT {job.out}: cannot be written ({error.strerror}); nothing was left behind"
        ) from None
    return record


def _write_shard(
    job: Export,
    shard: list[Output],
    reader: RowReader,
    file: BinaryIO,
    rounding: Rounding | None,
    progress: Callable[[int], None],
) -> None:
    file.write(format_header([(output.name, output.shape) for output in shard], job.dtype))
    for values in ahead(_tasks(job, shard, reader, rounding)):
        file.write(as_bytes(values))
        progress(values.nbytes)


def _tasks(
    job: Export, shard: list[Output], reader: RowReader, rounding: Rounding | None
) -> Iterator[Callable[[bytearray], torch.Tensor]]:
    """What to call, in this order, for all values of a file."""
    for output in shard:
        match output.source:
            case Moved(key):
                row_bytes = math.prod(output.shape[1:]) * job.checkpoint.tensors[key].dtype.itemsize
                for rows in blocks(output.shape[0], row_bytes):
                    yield partial(_read_rows, job, output, output.source, reader, rows)
            case Folded():
                yield partial(_fold, job, output.source, reader, rounding)
            case Zeros():
                yield partial(_zeros, job, output)


def _read_rows(
    job: Export, output: Output, source: Moved, reader: RowReader, rows: tuple[int, int], scratch: bytearray
) -> torch.Tensor:
    """Rows of a tensor, gathered from where they stand in Megatron's."""
    stored = job.checkpoint.tensors[source.key].dtype
    values = scratch_rows(scratch, stored, (rows[1] - rows[0], *output.shape[1:]))
    position = 0
    for _, first, last in name_table.cut(source.runs, *rows):
        reader.read(source.key, source.index, first, last, values[position : position + last - first])
        position += last - first
    return cast(values, job.dtype, f"{job.checkpoint.root}: {source.key}")


def _fold(
    job: Export, source: Folded, reader: RowReader, rounding: Rounding | None, scratch: bytearray
) -> torch.Tensor:
    """A tensor of a layer's gate; with the first, what rounding them changes is added to ``rounding``."""
    assert job.router is not None and job.gate is not None and rounding is not None
    layer = source.layer
    gate = read_gate(job.checkpoint, job.router, job.sizes, layer)
    values = cast(gate[source.name], job.dtype, f"{job.checkpoint.root}: the router of layer {layer}")
    if source.name != next(iter(job.gate)):
        return values
    key = job.keys[name_table.NORM_BEFORE_FFN]
    norm = torch.empty(job.model.hidden_size, dtype=job.checkpoint.tensors[key].dtype)
    reader.read(key, (layer,), 0, len(norm), norm)
    rounding.add(gate, norm, job.router, layer, job.dtype)
    return values


def _zeros(job: Export, output: Output, scratch: bytearray) -> torch.Tensor:
    return torch.zeros(output.shape, dtype=job.dtype)


def _record(job: Export, rounding: Rounding | None) -> dict[str, Any]:
    """What made the folder."""
    upcycled = job.manifest or {}
    return {
        "format": 1,
        "source": {
            "name": job.checkpoint.root.absolute().name,
            "iteration": job.checkpoint.iteration_dir.name,
            "digest": job.checkpoint.digest(),
        },
        "architecture": job.model.describe(),
        "dtype": dtype_name(job.dtype),
        "router": job.router.to_dict() if job.router else None,
        "rounding": asdict(rounding) if rounding else None,
        "upcycled": {name: upcycled[name] for name in ("seed", "versions") if name in upcycled} or None,
        "versions": versions(),
    }


def describe_result(job: Export, record: dict[str, Any], seconds: float) -> str:
    """What was made, and how to load it."""
    size = files.format_bytes(job.bytes_to_write)
    what = f"{class_name(job)}, {record['architecture']}, {record['dtype']}"
    lines = [f"{job.out}: {what}, {size} in {seconds:.1f} s"]
    if record["rounding"]:
        lines.append(Rounding(**record["rounding"]).describe(record["dtype"]))
    if job.tokenizer is None:
        lines.append("no tokenizer was found; name its folder with --tokenizer DIR, or copy its files there")
    code = "" if job.is_stock else ", trust_remote_code=True"
    lines.append(f'next: AutoModelForCausalLM.from_pretrained("{job.out}"{code})')
    return "\n".join(lines)
