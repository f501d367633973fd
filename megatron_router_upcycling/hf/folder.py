"""What stands beside the weights in an exported folder: configurations, tokenizer, model card, record."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_router_upcycling import __version__
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf.gate import Rounding
from megatron_router_upcycling.hf.importer import (
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
from megatron_router_upcycling.hf.values import dtype_name

if TYPE_CHECKING:
    from megatron_router_upcycling.hf.exporter import Export

RECORD = "export_hf.json"
GENERATION_CONFIG = "generation_config.json"
MODELLING_FILE = "modeling_upcycled_qwen_moe.py"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_tokenizer(asked: Path | None, checkpoint: Checkpoint) -> Path | None:
    """The folder of the tokenizer: the one asked for, the one that training used, or none.

    Raises:
        UserError: the one asked for holds no tokenizer.
    """
    if asked is not None:
        if not is_tokenizer(asked):
            raise UserError(f"--tokenizer {asked}: holds none of {', '.join(TOKENIZER_FILES)}")
        return asked
    used = getattr(checkpoint.args, "tokenizer_model", None)
    if getattr(checkpoint.args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        used = None
    for folder in (used, checkpoint.root / TOKENIZER):
        if folder is not None and is_tokenizer(Path(folder)):
            return Path(folder)
    return None


def write_folder(job: "Export", folder: Path, record: dict[str, Any]) -> None:
    """Write everything but the weights."""
    special = _copy_tokenizer(job.tokenizer, folder) if job.tokenizer else {}
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


def shard_name(number: int, count: int) -> str:
    """The name of a file of weights, counted from 1."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy the tokenizer's files; return the ids of its special tokens as config.json has them."""
    files = (*TOKENIZER_FILES, *BESIDE_TOKENIZER)
    copy_files(source, target, tuple(file for file in files if file != CONFIG))
    for file in (CONFIG, GENERATION_CONFIG):
        if (source / file).is_file():
            found = read_json(source / file)
            return {name: found[name] for name in SPECIAL_TOKENS if found.get(name) is not None}
    return {}


def class_name(job: "Export") -> str:
    """The class that loads the folder."""
    stock = str(job.model.hf_config()["architectures"][0])
    return stock if job.is_stock else f"Upcycled{stock}"


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


def model_card(job: "Export", record: dict[str, Any]) -> str:
    """README.md: what the model is and what made it."""
    code = "" if job.is_stock else ", trust_remote_code=True"
    source = record["source"]
    tags = "\ntags:\n- mixture-of-experts\n- router-upcycling" if job.router else ""
    text = f"""---
library_name: transformers
pipeline_tag: text-generation{tags}
---

# {job.out.absolute().name}

`{class_name(job)}`: {record["architecture"]}, {record["dtype"]}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{code})
```

Exported by megatron-router-upcycling {__version__} (`router-upcycle export-hf`) from the Megatron checkpoint
`{source["name"]}`, `{source["iteration"]}`, whose index has SHA-256 `{source["digest"]}`.
"""
    return text + _router_section(job, record) if job.router else text


def _router_section(job: "Export", record: dict[str, Any]) -> str:
    router = job.router
    assert router is not None and job.gates is not None
    kind = {
        "linear": "a linear layer",
        "mlp": "two layers with GELU between them",
        "switch": "Switch Transformer's, a linear layer (no token is dropped here)",
        "locmoe": "LocMoE's, the means of slices of the hidden state",
        "mixture": f"a mixture of {router.num_routers} routers, {router.pooling} pooling, made from a dense"
        " model's attention heads (Router Upcycling, [arXiv 2509.00679](https://arxiv.org/abs/2509.00679))",
    }[router.router]
    order = "softmax, then top-k" if router.pre_softmax else "top-k, then softmax"
    if job.is_stock:
        folded = "It is linear in the hidden state, and stands here as one gate a layer, folded in float32."
    elif job.gates.hidden is not None:
        folded = f"It stands here as it is: see `{MODELLING_FILE}`, which needs transformers 5."
    else:
        folded = (
            f"It stands here as {job.gates.num_rows} linear gates a layer, of which each expert takes the"
            f" maximum: see `{MODELLING_FILE}`, which needs transformers 5."
        )
    shared = ""
    if job.model.family == "qwen2":
        shared = "\n\nThe shared expert that the class asks for is all zeros: it adds exactly nothing."
    assert isinstance(record["rounding"], dict)
    rounding = Rounding(**record["rounding"]).describe(record["dtype"])
    return f"""
## Router

{router.num_experts} experts, {router.top_k} a token; the router is {kind}; {order}. {folded}{shared}

Precision: {rounding}
(random hidden states of unit variance, through each layer's norm).
"""
