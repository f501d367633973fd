"""The files of an exported folder besides the weights: configurations, tokenizer, model card, record."""

import inspect
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.read_config_json import ENTRIES
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import exported_tokenizer, files, model_card
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import CARD, CONFIG, GENERATION_CONFIG, INDEX, MODELLING_FILE
from megatron_router_upcycling.hf.safetensors_file import dtype_name
from megatron_router_upcycling.routers.kinds import Kind

RECORD = "export_hf.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_beside(asked: Path | None, checkpoint: Checkpoint) -> Path | None:
    """The tokenizer's folder: the one asked for, else the checkpoint's, else training's, else None."""
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
    """Write everything but the weights; add warnings about the tokenizer to ``record``."""
    special = _copy_beside(job.beside, folder) if job.beside else {}
    files.write_json(folder / CONFIG, _config(job) | special)
    kind, model = (job.beside and beside.tokenizer_of(job.beside)) or ("", folder)
    if kind == "SentencePieceTokenizer":
        record["no_tokenizer"], ids = exported_tokenizer.convert(model, folder)
        special |= {name: ids[name] for name in SPECIAL_TOKENS if name in ids}
        files.write_json(folder / CONFIG, _config(job) | special)
    elif job.beside and beside.is_tokenizer(job.beside):
        own = find_beside(None, job.checkpoint)
        other = own if own != job.beside and own and beside.is_tokenizer(own) else None
        record["tokenizer_fault"] = exported_tokenizer.agree(job.beside, folder, other)
    if not (folder / GENERATION_CONFIG).exists():
        files.write_json(folder / GENERATION_CONFIG, {"_from_model_config": True} | special)
    if len(job.shards) > 1:
        places = {output.name: file for file, shard in job.shards.items() for output in shard}
        index = {"metadata": {"total_size": job.bytes_to_write}, "weight_map": places}
        files.write_json(folder / INDEX, index)
    if job.router is not None and not job.is_stock:
        (folder / MODELLING_FILE).write_text(_modelling_file(job.router.kind), encoding="utf-8")
    files.write_json(folder / RECORD, record)
    (folder / CARD).write_text(model_card.model_card(job, record), encoding="utf-8")


def _copy_beside(source: Path, target: Path) -> dict[str, Any]:
    """Copy the files besides the weights; return the special tokens' ids, as entries of config.json."""
    carried = beside.look(source).carried
    beside.copy(source, [file for file in carried if str(file) not in (CONFIG, CARD, RECORD)], target)
    for file in (CONFIG, GENERATION_CONFIG):
        if (source / file).is_file():
            found = files.read_json(source / file)
            return {name: found[name] for name in SPECIAL_TOKENS if found.get(name) is not None}
    return {}


def _modelling_file(kind: Kind) -> str:
    """The source of the classes that load a model, followed by that of the router kind's logits."""
    classes = Path(__file__).with_name(MODELLING_FILE).read_text(encoding="utf-8")
    functions = [inspect.getsource(function) for function in (*kind.helpers, kind.logits)]
    entry = f'LOGITS["{kind.name}"] = {kind.logits.__name__}\n'
    return "\n\n".join([classes, *functions, entry])


def _config(job: Export) -> dict[str, Any]:
    """The config.json, without special tokens."""
    model, router = job.model, job.router
    config = from_model(model, job.class_name) | {"torch_dtype": dtype_name(job.dtype)}
    if router is None:
        return config
    losses = model_card.aux_losses(job)
    config |= {
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": model.expert_ffn_size,
        # False: softmax over all experts, then top-k; True: renormalised, which equals top-k, then softmax
        "norm_topk_prob": not router.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": model_card.loss_coefficient(losses, len(model.expert_layers), router.top_k),
    }
    if model.family == "qwen3":
        config["num_local_experts"] = router.num_experts  # the name that transformers 5 saves
    else:
        config |= {"qkv_bias": True, "shared_expert_intermediate_size": job.shared_expert_width}
    if not job.is_stock:
        module = MODELLING_FILE.removesuffix(".py")
        config["auto_map"] = {"AutoModelForCausalLM": f"{module}.{job.class_name}"}
        config |= {"upcycled_router": router.to_dict(), "upcycled_gate": job.gate}
    return config


def from_model(model: QwenModel, class_name: str) -> dict[str, Any]:
    """The entries that a dense and an MoE config.json share; ``read_config_json`` is the inverse."""
    config = {entry: getattr(model, attribute) for entry, (attribute, _) in ENTRIES.items()}
    config |= {
        "model_type": model.model_type,
        "architectures": [class_name],
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # transformers 5 reads rope_parameters; transformers 4 and the inference engines read rope_theta
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "rope_theta": float(model.rotary_base),
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
    }
    if model.qk_norm:
        config["attention_bias"] = False
    if model.qk_norm or model.kv_channels * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.kv_channels
    return config | {"max_window_layers": model.num_layers}
