"""Small random Qwen models, made and saved by transformers; its logits and its tensors."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

SIZES = {"vocab_size": 250, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
# Name -> configuration class, what differs from SIZES, and how it is saved.
FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "qwen1.5": (transformers.Qwen2Config, {"num_key_value_heads": 8, "vocab_size": 256}, {}),
    "qwen2.5": (transformers.Qwen2Config, {"tie_word_embeddings": True}, {"max_shard_size": "60KB"}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}, {"max_shard_size": "90KB"}),
    "qwen3-tied": (transformers.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}, {}),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 3}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 40}
MOES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "qwen2-moe": (transformers.Qwen2MoeConfig, SHARED, {}),
    "qwen2-moe-tied": (
        transformers.Qwen2MoeConfig,
        SHARED | {"tie_word_embeddings": True, "decoder_sparse_step": 2, "norm_topk_prob": True},
        {"max_shard_size": "90KB"},
    ),
    "qwen3-moe": (transformers.Qwen3MoeConfig, EXPERTS | {"head_dim": 16, "norm_topk_prob": True}, {}),
    "qwen3-moe-tied": (
        transformers.Qwen3MoeConfig,
        EXPERTS | {"tie_word_embeddings": True, "mlp_only_layers": [1], "router_aux_loss_coef": 0.01},
        {"max_shard_size": "60KB"},
    ),
}
ROPE_THETA = {"qwen1.5": 10000.0, "qwen2.5": 1000000.0, "qwen3": 5000000.0, "qwen3-tied": 10000.0}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model of a family; every bias and norm has values that a mistake would show in."""
    kind, differs, saving = (FAMILIES | MOES)[name]
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA.get(name, 10000.0)}
    config = kind(**SIZES | {"rope_parameters": rope} | differs | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder, **saving)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(folder: Path, **options: Any) -> Any:
    """The model that transformers loads, which misses nothing and finds nothing unexpected."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of the model in ``folder``."""
    return load(folder, **options)(tokens).logits
