"""A model as config.json, as Megatron's flags and as its arguments, and what is refused in either."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, megatron_arguments
from megatron_router_upcycling.checkpoint.read_config_json import to_flags
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf.architecture import from_flags, from_megatron
from megatron_router_upcycling.hf.folder import from_model
from megatron_router_upcycling.hf.model_card import loss_coefficient

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN2_MOE = EXPERTS | {"model_type": "qwen2_moe", "architectures": None, "num_experts": 4}
QWEN2_MOE |= {"shared_expert_intermediate_size": 16}
QWEN3_MOE = EXPERTS | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeModel"], "num_local_experts": 4}
WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


def test_config_to_flags_to_arguments_and_back() -> None:
    flags = to_flags(CONFIG | {"rope_theta": 1e6}, Path("config.json"), 64)
    model, args = from_flags(flags), megatron_arguments(flags)
    assert (model.kv_channels, model.family, model.rotary_base) == (128, "qwen3", 1000000)
    assert to_flags(from_model(model, "Qwen3ForCausalLM"), Path("config.json"), 64) == flags
    assert from_megatron(args, Path("root"), 64) == model
    assert not [name for name in ARCHITECTURE.values() if name not in args]


def test_a_mixture_of_experts_as_flags() -> None:
    """Layers counted as transformers does; the other entries where it takes its defaults."""
    config = CONFIG | QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    flags = to_flags(config, Path("config.json"), 64)
    assert (flags["moe_layer_freq"], flags["kv_channels"]) == ("[0, 1, 0, 0, 0, 1]", 4)
    assert (flags["num_experts"], flags["moe_router_topk"], flags["moe_ffn_hidden_size"]) == (4, 2, 12)
    assert flags["moe_router_pre_softmax"] and flags["moe_aux_loss_coeff"] == 0.001  # 2 experts, 2 layers
    model = from_flags(flags)
    assert list(model.expert_layers) == [1, 5] and not model.shared_expert_size
    shared = from_flags(to_flags(CONFIG | QWEN2_MOE, Path("config.json"), 64))
    assert (shared.shared_expert_size, shared.shared_expert_gated, shared.dense_layers) == (16, True, ())


@pytest.mark.parametrize("coefficient", [0.001, 0.02, 0.123456789])
def test_the_coefficient_of_load_balancing_comes_back(coefficient: float) -> None:
    """Digit by digit, where it has no more than 12."""
    changes = QWEN3_MOE | {"num_local_experts": 8, "router_aux_loss_coef": coefficient}
    for top_k in range(1, 9):
        for layers in (1, 3, 24, 48, 94):
            config = CONFIG | changes | {"num_experts_per_tok": top_k, "num_hidden_layers": layers}
            own = to_flags(config, Path("config.json"), 64)["moe_aux_loss_coeff"]
            back = loss_coefficient({"aux_loss": own}, layers, top_k)
            assert back == coefficient


ROPE = {"rope_type": "default", "rope_theta": 5e6}


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": ROPE}, {"rope_parameters": ROPE}, {"rope_theta": 5e6}]
    + [{"rope_scaling": ROPE, "rope_theta": 1e4}],
)
def test_rope_theta_is_found_where_transformers_finds_it(changes: dict[str, object]) -> None:
    switched_off = {"tie_word_embeddings": None}  # a null
    flags = to_flags(CONFIG | changes | switched_off, Path("config.json"), 1)
    assert flags["rotary_base"] == 5000000 and flags["untie_embeddings_and_output_weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM .model_type qwen3. is not covered"),
        (
            QWEN3_MOE | {"architectures": ["UpcycledQwen3MoeForCausalLM"]},
            "UpcycledQwen3MoeForCausalLM .* is not covered; import-hf takes Qwen2ForCausalLM, .*Qwen3Moe",
        ),
        ({"model_type": "qwen3_next", "architectures": None}, "qwen3_next .* is not covered"),
        (QWEN3_MOE | {"num_local_experts": None}, "has no num_experts"),
        (QWEN3_MOE | {"num_experts": 0}, "num_experts is 0"),
        (QWEN3_MOE | {"moe_intermediate_size": 1.5}, "moe_intermediate_size is 1.5"),
        (QWEN3_MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok 5 of num_experts 4"),
        (QWEN3_MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob with one expert"),
        (QWEN3_MOE | {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        (QWEN3_MOE | {"router_aux_loss_coef": "0"}, "router_aux_loss_coef is '0'"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN3_MOE | {"decoder_sparse_step": 3}, "leave no layer with experts"),
        (QWEN3_MOE | {"mlp_only_layers": 1}, "an entry of the wrong kind"),
        (
            QWEN3_MOE | {"mlp_only_layers": [0], "num_hidden_layers": 10**9},
            "1000000000, some without experts",
        ),
        (QWEN3_MOE | WINDOW, "sliding window"),  # in all layers, whatever max_window_layers says
        (QWEN3_MOE | {"attention_bias": True}, "attention_bias in Qwen3"),
        (QWEN2_MOE | {"qkv_bias": False}, "qkv_bias false: not covered"),
        (QWEN2_MOE | {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is None"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM .*is not covered"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Classification .*is not covered"),
        ({"model_type": None, "architectures": None}, "None is not covered"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"quantization": {"bits": 4}}, "quantised weights"),
        (
            {"dual_chunk_attention_config": {"original_max_position_embeddings": 32}},
            "dual_chunk_attention_config",
        ),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling or rope_parameters other"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling or rope_parameters other"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "the same in all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is no whole number"),
        ({"hidden_act": "gelu"}, "hidden_act other than 'silu': not covered"),
        ({"attention_bias": True}, "attention_bias in Qwen3"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_size": 24.5}, "hidden_size is 24.5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide num_attention_heads 6"),
        ({"rope_parameters": [1]}, "an entry of the wrong kind"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{message}") as error:
        to_flags(CONFIG | changes, Path("config.json"), 128)
    assert "\n" not in str(error.value)


def test_a_window_that_no_layer_uses_is_covered() -> None:
    """As in the config.json of Qwen2.5: switched off, or beginning after the last layer."""
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 1}
    assert to_flags(CONFIG | unused, Path("config.json"), 1)["num_layers"] == 2
    after = {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 2}
    assert to_flags(CONFIG | after, Path("config.json"), 1)["num_layers"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm' where a Qwen class has 'RMSNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"qk_layernorm": True}, "both of QKV bias and query/key norms"),
        ({"add_qkv_bias": False}, "neither of QKV bias and query/key norms"),
        ({"multi_latent_attention": True}, "multi_latent_attention True"),
        ({"num_experts": 4, "moe_router_score_function": "sigmoid"}, "moe_router_score_function 'sigmoid'"),
        ({"num_experts": 4, "moe_router_num_groups": 2}, "moe_router_num_groups 2"),
        ({"num_layers": "many"}, "do not give the architecture"),
    ],
)
def test_a_checkpoint_that_no_class_holds(changes: dict[str, object], message: str) -> None:
    args = Namespace(**vars(megatron_arguments(to_flags(CONFIG | QWEN2, Path("config.json"), 64))) | changes)
    with pytest.raises(UserError, match=f"^root: .*{message}"):
        from_megatron(args, Path("root"), 64)
