"""What stands beside the weights in an exported folder: configurations, tokenizer, model card, record."""

import inspect
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import config_json, exported_tokenizer
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import (
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    MODELLING_FILE,
    read_json,
)
from megatron_router_upcycling.hf.model_card import model_card
from megatron_router_upcycling.hf.safetensors_file import dtype_name
from megatron_router_upcycling.routers.kinds import Kind

RECORD = "export_hf.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_beside(asked: Path | None, checkpoint: Checkpoint) -> Path | None:
    """The folder of the tokenizer and what else goes with it.

    The one asked for, the one beside the checkpoint, the one that training used, or none.
    """
    if asked is not None:
        if not beside.is_tokenizer(asked):
            raise UserError(f"--tokenizer {asked}: holds none of {', '.join(beside.TOKENIZER_FILES)}")
        return asked
    own, used = checkpoint.root / beside.FOLDER, getattr(checkpoint.args, "tokenizer_model", None)
    if getattr(checkpoint.args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        used = None
    folders = [folder for folder in (own, used and Path(used)) if folder and folder.is_dir()]
    return next(filter(beside.is_tokenizer, folders), next(iter(folders), None))


def write_folder(job: Export, folder: Path, record: dict[str, Any]) -> None:
    """Write everything but the weights; what is said of the tokenizer goes into ``record`` as well."""
    special = _copy_beside(job.beside, folder) if job.beside else {}
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
        places = {output.name: file for file, shard in job.shards.items() for output in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": job.bytes_to_write}, "weight_map": places})
    if job.router is not None and not job.is_stock:
        (folder / MODELLING_FILE).write_text(_modelling_file(job.router.kind), encoding="utf-8")
    _write_json(folder / RECORD, record)
    (folder / CARD).write_text(model_card(job, record), encoding="utf-8")


def _copy_beside(source: Path, target: Path) -> dict[str, Any]:
    """Copy what stands beside the weights; return the ids of special tokens as config.json has them."""
    files = [file for file in beside.look(source).carried if str(file) not in (CONFIG, CARD, RECORD)]
    beside.copy(source, files, target)
    for file in (CONFIG, GENERATION_CONFIG):
        if (source / file).is_file():
            found = read_json(source / file)
            return {name: found[name] for name in SPECIAL_TOKENS if found.get(name) is not None}
    return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _modelling_file(kind: Kind) -> str:
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
