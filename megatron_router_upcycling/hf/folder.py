"""What stands beside the weights in an exported folder: configurations, tokenizer, model card, record."""

import inspect
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.hf import config_json, exported_tokenizer
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import (
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    MODELLING_FILE,
    copy_beside,
    find_beside,
    shard_name,
)
from megatron_router_upcycling.hf.model_card import model_card
from megatron_router_upcycling.hf.safetensors_file import dtype_name
from megatron_router_upcycling.routers.kinds import Kind

RECORD = "export_hf.json"


def write_folder(job: Export, folder: Path, record: dict[str, Any]) -> None:
    """Write everything but the weights."""
    special = copy_beside(job.beside, folder) if job.beside else {}
    model = exported_tokenizer.find_sentencepiece(job.beside) if job.beside else None
    if model:
        special |= exported_tokenizer.special_tokens(model)
    _write_json(folder / CONFIG, _config(job) | special)
    if model:
        record["no_tokenizer"] = exported_tokenizer.convert(model, folder)
    elif job.beside and beside.is_tokenizer(job.beside):
        own = find_beside(None, job.checkpoint)
        other = own if own != job.beside and own and beside.is_tokenizer(own) else None
        record["tokenizer_fault"] = exported_tokenizer.agree(job.beside, folder, other)
    if not (folder / GENERATION_CONFIG).exists():
        _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True} | special)
    if len(job.shards) > 1:
        places = {
            output.name: shard_name(number, len(job.shards))
            for number, shard in enumerate(job.shards, start=1)
            for output in shard
        }
        _write_json(folder / INDEX, {"metadata": {"total_size": job.bytes_to_write}, "weight_map": places})
    if job.router is not None and not job.is_stock:
        (folder / MODELLING_FILE).write_text(modelling_file(job.router.kind), encoding="utf-8")
    _write_json(folder / RECORD, record)
    (folder / CARD).write_text(model_card(job, record), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def modelling_file(kind: Kind) -> str:
    """The source of the classes that load a model, with that of the kind's logits at its end."""
    classes = Path(__file__).with_name(MODELLING_FILE).read_text(encoding="utf-8")
    functions = [inspect.getsource(function) for function in (*kind.helpers, kind.logits)]
    entry = f'LOGITS["{kind.name}"] = {kind.logits.__name__}\n'
    return "\n\n".join([classes, *functions, entry])


def _config(job: Export) -> dict[str, Any]:
    """The config.json, but for special tokens."""
    values = config_json.from_model(job.model) | {
        "architectures": [job.class_name],
        "max_window_layers": job.model.num_layers,
        "torch_dtype": dtype_name(job.dtype),
    }
    if job.router is None:
        return values
    width, coefficient = job.shared_expert_width, job.aux_loss_coefficient
    values |= config_json.of_experts(job.model, job.router, width, coefficient)
    if job.is_stock:
        return values
    module = MODELLING_FILE.removesuffix(".py")
    return values | {
        "auto_map": {"AutoModelForCausalLM": f"{module}.{job.class_name}"},
        "upcycled_router": job.router.to_dict(),
        "upcycled_gate": job.gate,
    }
