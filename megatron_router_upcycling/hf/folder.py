"""What stands beside the weights in an exported folder: configurations, tokenizer, model card, record."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_router_upcycling.hf.export_job import Export, class_name
from megatron_router_upcycling.hf.files import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    MODELLING_FILE,
    copy_tokenizer,
    shard_name,
)
from megatron_router_upcycling.hf.model_card import model_card
from megatron_router_upcycling.hf.values import dtype_name

RECORD = "export_hf.json"


def write_folder(job: "Export", folder: Path, record: dict[str, Any]) -> None:
    """Write everything but the weights."""
    special = copy_tokenizer(job.tokenizer, folder) if job.tokenizer else {}
    _write_json(folder / CONFIG, config(job) | special)
    if not (folder / GENERATION_CONFIG).exists():
        _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True} | special)
    if len(job.shards) > 1:
        places = {
            output.name: shard_name(number, len(job.shards))
            for number, shard in enumerate(job.shards, start=1)
            for output in shard
        }
        _write_json(folder / INDEX, {"metadata": {"total_size": job.bytes_to_write}, "weight_map": places})
    if not job.is_stock:
        shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), folder / MODELLING_FILE)
    _write_json(folder / RECORD, record)
    (folder / "README.md").write_text(model_card(job, record), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config(job: "Export") -> dict[str, Any]:
    """The config.json, but for special tokens."""
    values = job.model.hf_config()
    values["architectures"] = [class_name(job)]
    values["max_window_layers"] = job.model.num_layers
    values["torch_dtype"] = dtype_name(job.dtype)
    if job.router is None or job.gates is None:
        return values
    loss = getattr(job.checkpoint.args, "moe_aux_loss_coeff", 0.0)
    values |= {
        "num_experts": job.router.num_experts,
        "num_experts_per_tok": job.router.top_k,
        "moe_intermediate_size": job.model.ffn_hidden_size,
        # softmax over all experts, then top-k as they are; or renormalised, which is top-k, then softmax
        "norm_topk_prob": not job.router.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": loss if isinstance(loss, float) else 0.0,
    }
    if job.model.family == "qwen2":
        values |= {"qkv_bias": True, "shared_expert_intermediate_size": job.options.shared_expert_width}
    if not job.is_stock:
        module = MODELLING_FILE.removesuffix(".py")
        values |= {
            "auto_map": {"AutoModelForCausalLM": f"{module}.{class_name(job)}"},
            "router_gates": job.gates.num_rows,
            "router_keys_per_expert": job.gates.keys_per_expert,
            "router_has_hidden_layer": job.gates.hidden is not None,
        }
    return values
