"""A Megatron checkpoint, dense or Mixture-of-Experts, into a Hugging Face folder.

A dense model becomes ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``, a Mixture-of-Experts whose router folds
into one linear gate ``Qwen2MoeForCausalLM`` or ``Qwen3MoeForCausalLM``: stock classes, which transformers,
vLLM and SGLang load without code of ours. Values are streamed, block by block.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.layers import stack_layers
from megatron_router_upcycling.checkpoint.names import EMBEDDING, ROUTER, TRAINING_STATE, other_norm
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import format_bytes, sync, versions
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel, from_megatron
from megatron_router_upcycling.hf.export_job import Export, Options, outputs, split
from megatron_router_upcycling.hf.files import find_beside, shard_name
from megatron_router_upcycling.hf.folder import RECORD, write_folder
from megatron_router_upcycling.hf.safetensors_file import dtype_name
from megatron_router_upcycling.hf.shard import Rounding, write_shard
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig

WIDTH_OF_ZEROS = 128  # of the shared expert that adds nothing


def prepare(root: Path, out: Path, options: Options) -> Export:
    """Read and check everything but the values; write nothing.

    Raises:
        UserError: whatever would make the export fail and can be known beforehand.
    """
    checkpoint = open_checkpoint(root)
    root = checkpoint.root
    publish.check_target(out, root, options.overwrite, source_name="MOE", made_by=RECORD)
    if EMBEDDING not in checkpoint.tensors:
        raise UserError(f"{root}: has no tensor {EMBEDDING}; export-hf takes a GPT model")
    model = from_megatron(checkpoint.args, root, checkpoint.tensors[EMBEDDING].shape[0])
    checkpoint = stack_layers(checkpoint, model.expert_layers)
    recorded = manifest.read(root)
    router = _router(checkpoint, recorded, model) if model.num_experts else None
    gate = kinds.gate_shapes(router, kinds.Sizes.of(model)) if router else {}
    width = _shared_expert_width(options.shared_expert_width, model)
    if router and not options.modelling_code and (why := router.kind.not_stock(router)):
        raise UserError(
            f"MOE {root}: its router {why}, which no stock class computes; pass --modelling-code to write a"
            " modelling file beside the weights, which is loaded with trust_remote_code"
        )
    stored = _stored_names(checkpoint, model)
    _check_tensors(checkpoint, model, router, stored)
    dtype = options.dtype or checkpoint.tensors[stored[name_table.PROJECTION]].dtype
    tensors = list(outputs(model, stored, gate, width))
    job = Export(
        checkpoint=checkpoint,
        out=out,
        model=model,
        router=router,
        gate=gate,
        shared_expert_width=width,
        dtype=dtype,
        beside=find_beside(options.tokenizer, checkpoint),
        options=options,
        stored=stored,
        shards=split(tensors, dtype, options.max_shard_bytes),
        manifest=recorded,
    )
    publish.check_space(out, job.bytes_to_write)
    return job


def _shared_expert_width(asked: int | None, model: QwenModel) -> int:
    """The model's own; else that of the expert of zeros."""
    if asked is not None and asked < 0:
        raise UserError(f"--shared-expert-width {asked}: must be 0 or more")
    if asked is not None and model.shared_expert_size:
        raise UserError(
            f"--shared-expert-width {asked}: the model has a shared expert of its own, of width"
            f" {model.shared_expert_size}; leave it out"
        )
    return model.shared_expert_size or (WIDTH_OF_ZEROS if asked is None else asked)


def _router(checkpoint: Checkpoint, recorded: dict[str, Any] | None, model: QwenModel) -> RouterConfig:
    """The router that the manifest records; without one, Megatron's own linear router."""
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


def _stored_names(checkpoint: Checkpoint, model: QwenModel) -> dict[str, str]:
    """The tensor of each row -> the name that the checkpoint has for it.

    A norm goes by two names. Where both are there, as convert leaves them, they are the same bytes.
    """
    names = [row.megatron for row in name_table.rows(model)]
    return {name: name if name in checkpoint.tensors else other_norm(name) or name for name in names}


def _check_tensors(
    checkpoint: Checkpoint, model: QwenModel, router: RouterConfig | None, stored: dict[str, str]
) -> None:
    """Compare the checkpoint's tensors with the architecture."""
    root, tensors = checkpoint.root, checkpoint.tensors
    expected = _router_shapes(router, model)
    for row in name_table.rows(model):
        expected[stored[row.megatron]] = name_table.megatron_shape(row, model)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{root}: has no tensor {name}, which its training arguments ask for")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(f"{root}: {name} is {found} where the training arguments give {list(shape)}")
    for name in tensors:
        is_known = name in expected or other_norm(name) in expected or TRAINING_STATE.match(name)
        if not is_known:
            raise UserError(f"{root}: holds {name}, which has no place in a {model.family} model")


def _router_shapes(router: RouterConfig | None, model: QwenModel) -> dict[str, tuple[int, ...]]:
    """The routers' tensors over all layers that have one, by their names in Megatron."""
    if router is None:
        return {}
    own = router.kind.parameters(router, kinds.Sizes.of(model))
    return {f"{ROUTER}.{parameter.name}": (len(model.expert_layers), *parameter.shape) for parameter in own}


def run(job: Export, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the folder and return its record. On any exception nothing is left behind.

    Args:
        progress: called with the number of bytes after each write.
    """
    rounding = Rounding()
    try:
        with (
            publish.new_folder(job.out, job.options.overwrite) as folder,
            ThreadPoolExecutor(1) as aside,
        ):
            flushed = []
            for number, shard in enumerate(job.shards, start=1):
                path = folder / shard_name(number, len(job.shards))
                write_shard(job, shard, path, rounding, progress)
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


def _record(job: Export, rounding: Rounding) -> dict[str, Any]:
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
        "rounding": asdict(rounding) if job.router else None,
        "upcycled": {name: upcycled[name] for name in ("seed", "versions") if name in upcycled} or None,
        "versions": versions(),
    }


def describe_result(job: Export, record: dict[str, Any], seconds: float) -> str:
    """What was made, and how to load it."""
    size = format_bytes(job.bytes_to_write)
    what = f"{job.class_name}, {record['architecture']}, {record['dtype']}"
    lines = [f"{job.out}: {what}, {size} in {seconds:.1f} s"]
    if record["rounding"]:
        lines.append(Rounding(**record["rounding"]).describe(record["dtype"]))
    if job.llama_cpp_fault:
        lines.append(job.llama_cpp_fault)
    why = record.get("no_tokenizer")
    if why or not beside.is_tokenizer(job.out):
        found = f"written: {why}" if why else "found"
        lines.append(
            f"no tokenizer was {found}; name its folder with --tokenizer DIR, or copy its files there"
        )
    if record.get("tokenizer_fault"):
        lines.append(f"tokenizer: {record['tokenizer_fault']}")
    if job.left_out:
        lines.append(f"left out: {', '.join(job.left_out)}")
    code = "" if job.is_stock else ", trust_remote_code=True"
    lines.append(f'next: AutoModelForCausalLM.from_pretrained("{job.out}"{code})')
    return "\n".join(lines)
