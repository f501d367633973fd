"""An exported model as config.json; ``checkpoint.read_config_json`` is the way back. Pure: no torch."""

from typing import Any

from megatron_router_upcycling.checkpoint.read_config_json import DENSE_CLASSES, ENTRIES
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.routers.config import RouterConfig

MOE_CLASSES = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def class_name(model: QwenModel) -> str:
    """The stock class that holds the model."""
    return (MOE_CLASSES if model.num_experts else DENSE_CLASSES)[model.family]


def from_model(model: QwenModel) -> dict[str, Any]:
    """What a dense and an MoE config.json have in common, but for dtype and special tokens."""
    config = {entry: getattr(model, attribute) for entry, (attribute, _) in ENTRIES.items()}
    config |= {
        "model_type": model.family + "_moe" * bool(model.num_experts),
        "architectures": [class_name(model)],
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # transformers 5 reads the one, transformers 4 and the inference engines the other
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
    return config


def of_experts(
    model: QwenModel, router: RouterConfig, shared_expert_width: int, aux_loss_coefficient: float
) -> dict[str, Any]:
    """What an MoE config.json has beside that."""
    config = {
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": model.expert_ffn_size,
        # softmax over all experts, then top-k as they are; or renormalised, which is top-k, then softmax
        "norm_topk_prob": not router.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": aux_loss_coefficient,
    }
    if model.family == "qwen3":
        return config | {"num_local_experts": router.num_experts}  # the name that transformers 5 saves
    return config | {"qkv_bias": True, "shared_expert_intermediate_size": shared_expert_width}
