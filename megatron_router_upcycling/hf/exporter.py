"""Export a Megatron checkpoint, dense or Mixture-of-Experts, to a Hugging Face folder.

A dense model becomes ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``, a Mixture-of-Experts whose router folds
into one linear gate ``Qwen2MoeForCausalLM`` or ``Qwen3MoeForCausalLM``: stock classes, which transformers,
vLLM and SGLang load without custom code. Values are streamed, block by block.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.layers import stack_layers
from megatron_router_upcycling.checkpoint.names import EMBEDDING, ROUTER, TRAINING_STATE, other_norm
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.convert import Conversion
from megatron_router_upcycling.conversion.moe_arguments import fresh_common_state
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import format_bytes, versions
from megatron_router_upcycling.hf import model_card, name_table
from megatron_router_upcycling.hf.architecture import QwenModel, check_exportable, from_megatron
from megatron_router_upcycling.hf.export_job import Export, Gate, Options, stored_name
from megatron_router_upcycling.hf.files import CARD
from megatron_router_upcycling.hf.folder import RECORD, find_beside, write_folder
from megatron_router_upcycling.hf.safetensors_file import ahead, as_bytes, blocks, dtype_name, format_header
from megatron_router_upcycling.routers.config import RouterConfig

WIDTH_OF_ZEROS = 128  # of a shared expert of zeros
VALUE_BYTES = 4  # of a stored value, at most
SAMPLE_TOKENS = 1024  # for each layer, to measure what rounding its gate changes


def check_conversion(conversion: Conversion) -> str | None:
    """Refuse, before a conversion, options that turn an exportable dense model into an MoE that no Qwen class
    can represent. If the dense model itself cannot be exported, return a message that says so."""
    plan = conversion.plan
    try:
        check_exportable(plan.dense.args, plan.model, plan.dense.root)
    except UserError as error:
        return f"not for Hugging Face: {error}"
    args = fresh_common_state(plan.dense, plan.arguments)["args"]
    try:
        check_exportable(args, plan.model, plan.dense.root)
    except UserError as error:
        raise UserError(
            f"DENSE {error}; to train a model that stays in Megatron, pass --allow-no-export"
        ) from None
    return None


def prepare(root: Path, out: Path, options: Options) -> Export:
    """Read and check everything but the values; write nothing."""
    checkpoint = open_checkpoint(root)
    root = checkpoint.root
    publish.check_target(out, root, options.overwrite, source_name="MOE", made_by=RECORD)
    if EMBEDDING not in checkpoint.tensors:
        raise UserError(f"{root}: has no tensor {EMBEDDING}; export-hf takes a GPT model")
    model = from_megatron(checkpoint.args, root, checkpoint.tensors[EMBEDDING].shape[0])
    checkpoint = stack_layers(checkpoint, model.expert_layers)
    recorded = manifest.read(root)
    router = manifest.router_of(recorded, checkpoint.args, root) if model.num_experts else None
    if router and not options.modelling_code and (why := router.kind.not_stock(router)):
        raise UserError(
            f"MOE {root}: its router {why}, which no stock class computes; pass --modelling-code to write a"
            " modelling file beside the weights, which is loaded with trust_remote_code"
        )
    asked, own = options.shared_expert_width, model.shared_expert_size
    if asked is not None and (asked < 0 or own):
        raise UserError(
            f"--shared-expert-width {asked}: must be 0 or more, and be left out where the model has a shared"
            f" expert of its own (here of width {own})"
        )
    _check_tensors(checkpoint, model, router)
    job = Export(
        checkpoint=checkpoint,
        out=out,
        model=model,
        router=router,
        shared_expert_width=own or (WIDTH_OF_ZEROS if asked is None else asked),
        dtype=options.dtype or checkpoint.tensors[name_table.PROJECTION].dtype,
        beside=find_beside(options.tokenizer, checkpoint),
        options=options,
        manifest=recorded,
    )
    publish.check_space(out, job.bytes_to_write)
    return job


def _check_tensors(checkpoint: Checkpoint, model: QwenModel, router: RouterConfig | None) -> None:
    root, tensors = checkpoint.root, checkpoint.tensors
    expected = {stored_name(checkpoint, tensor.name): tensor.shape for tensor in name_table.tensors(model)}
    for parameter in router.kind.parameters(router, model) if router else ():
        expected[f"{ROUTER}.{parameter.name}"] = (len(model.expert_layers), *parameter.shape)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{root}: has no tensor {name}, which its training arguments ask for")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(f"{root}: {name} is {found} where the training arguments give {list(shape)}")
    for name in tensors:
        if not (name in expected or other_norm(name) in expected or TRAINING_STATE.match(name)):
            raise UserError(f"{root}: holds {name}, which has no place in a {model.family} model")


def run(job: Export, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the folder and return its record, or leave nothing. ``progress`` is called with bytes written."""
    with publish.new_folder(job.out, job.options.overwrite) as folder:
        for name, shard in job.shards.items():
            tasks = (partial(out.read, *rows) for out in shard for rows in blocks(out.shape, VALUE_BYTES))
            with open(folder / name, "xb") as file:
                file.write(format_header([(output.name, output.shape) for output in shard], job.dtype))
                for values in ahead(tasks):
                    file.write(as_bytes(values))
                    progress(values.nbytes)
        record = _record(job)
        write_folder(job, folder, record)
    return record


def _record(job: Export) -> dict[str, Any]:
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
        "rounding": _measure_rounding(job),
        "upcycled": {name: upcycled[name] for name in ("seed", "versions") if name in upcycled} or None,
        "versions": versions(),
    }


def _measure_rounding(job: Export) -> dict[str, int] | None:
    """What rounding the folded routers to the dtype changes: ``changed_choices``, summed over layers."""
    if job.router is None:
        return None
    norm = stored_name(job.checkpoint, name_table.NORM_BEFORE_FFN)
    total: Counter[str] = Counter()
    for layer in job.model.expert_layers:
        gain = job.checkpoint.read_layer(norm, layer, bytearray())
        total.update(changed_choices(job.read_gate(layer), gain, job.router, layer, job.dtype))
    return dict(total)


def changed_choices(
    gate: Gate, norm: torch.Tensor, router: RouterConfig, layer: int, dtype: torch.dtype
) -> dict[str, int]:
    """Count the choices of experts in a layer that change when its float32 gate is rounded to ``dtype``.

    The sample is a router's input for random hidden states of unit variance: the output, in ``dtype``, of the
    norm before the router, whose weight is ``norm`` [D]. Of all ``choices``, ``by_rounding`` change if only
    the gate is in ``dtype``, and ``by_arithmetic`` if the logits are too, as in a model of that dtype.
    """
    generator = torch.Generator().manual_seed(layer)
    tokens = (torch.randn(SAMPLE_TOKENS, len(norm), generator=generator) * norm.float()).to(dtype)

    def choose(tokens: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
        """The choices with the gate rounded to ``kept`` and logits in the dtype of ``tokens``."""
        rounded = {name: value.to(kept).to(tokens.dtype) for name, value in gate.items()}
        logits = router.kind.logits(rounded, tokens, router).float()
        return torch.zeros(logits.shape).scatter_(1, logits.topk(router.top_k, dim=1).indices, 1.0)

    exact = choose(tokens.float(), torch.float32)
    return {
        "choices": SAMPLE_TOKENS * router.top_k,
        "by_rounding": int((exact > choose(tokens.float(), dtype)).sum()),
        "by_arithmetic": int((exact > choose(tokens, dtype)).sum()),
    }


def describe_result(job: Export, record: dict[str, Any], seconds: float) -> str:
    """What was made, and how to load it."""
    what = f"{job.class_name}, {record['architecture']}, {record['dtype']}"
    lines = [f"{job.out}: {what}, {format_bytes(job.bytes_to_write)} in {seconds:.1f} s"]
    if record["rounding"]:
        lines.append(model_card.precision(record))
    lines += model_card.faults(job)
    if (why := record.get("no_tokenizer")) or not beside.is_tokenizer(job.out):
        what = f"written: {why}" if why else "found"
        lines.append(
            f"no tokenizer was {what}; name its folder with --tokenizer DIR, or copy its files there"
        )
    if record.get("tokenizer_fault"):
        lines.append(f"tokenizer: {record['tokenizer_fault']}")
    if job.beside:
        found = beside.look(job.beside)
        own = (f"{CARD} (the export has its own)",) * (Path(CARD) in found.carried)
        if left_out := (*own, *found.left_out):
            lines.append(f"left out: {', '.join(left_out)}")
    code = "" if job.is_stock else ", trust_remote_code=True"
    lines.append(f'next: AutoModelForCausalLM.from_pretrained("{job.out}"{code})')
    return "\n".join(lines)
