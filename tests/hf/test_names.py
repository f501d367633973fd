"""The table of names, the architecture, and the pieces that import and export are made of."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import Architecture, from_hf, from_megatron
from megatron_router_upcycling.hf.rounding import Gates, Rounding
from megatron_router_upcycling.hf.values import blocks, cast
from megatron_router_upcycling.initialisation.qkv import merge_gated_fc1, merge_qkv

MODEL = Architecture(
    num_layers=2, hidden_size=24, ffn_hidden_size=20, num_attention_heads=6, num_query_groups=2,
    kv_channels=5, qkv_bias=True, qk_norm=False, tied=False, norm_epsilon=1e-6, rotary_base=10000,
    vocab_size=50, padded_vocab_size=64, max_position_embeddings=32, init_method_std=0.02,
)  # fmt: skip
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


def row_of(key: str, model: Architecture) -> name_table.Row:
    (row,) = [row for row in name_table.rows(model) if row.megatron.endswith(key)]
    return row


def join(row: name_table.Row, model: Architecture, parts: list[torch.Tensor]) -> torch.Tensor:
    """Megatron's tensor of its parts, segment by segment."""
    width = parts[0].shape[1:]
    pieces = [
        torch.zeros(stop - start, *width) if part is None else parts[part][start:stop]
        for part, start, stop in name_table.segments(row, model)
    ]
    return torch.cat(pieces)


@given(groups=st.integers(1, 4), queries=st.integers(1, 4), size=st.integers(1, 5), columns=st.integers(1, 3))
def test_segments_are_megatrons_layout(groups: int, queries: int, size: int, columns: int) -> None:
    """Against the functions that take the fused tensors apart, and by their inverse, ``runs``."""
    heads = groups * queries
    model = dataclasses.replace(
        MODEL, num_attention_heads=heads, num_query_groups=groups, kv_channels=size, hidden_size=columns
    )
    for key, dim in (("linear_qkv.weight", -2), ("linear_qkv.bias", -1), ("mlp.linear_fc1.weight", -2)):
        row = row_of(key, model)
        parts = [torch.randn(name_table.shape(part, model)) for part in row.parts]
        joined = join(row, model, parts)
        merged = merge_qkv(*parts, heads, groups, dim) if len(parts) == 3 else merge_gated_fc1(*parts, dim)
        assert torch.equal(joined, merged)
        assert (model.num_layers, *joined.shape) == name_table.megatron_shape(row, model)
        for number, part in enumerate(parts):
            taken = [joined[start:stop] for start, stop in name_table.runs(row, number, model)]
            assert torch.equal(torch.cat(taken), part)


def test_padding_is_zeros_after_the_vocabulary() -> None:
    row = row_of("word_embeddings.weight", MODEL)
    assert name_table.segments(row, MODEL) == [(0, 0, 50), (None, 50, 64)]
    assert name_table.runs(row, 0, MODEL) == [(0, 50)]
    exact = dataclasses.replace(MODEL, padded_vocab_size=50)
    assert name_table.segments(row, exact) == [(0, 0, 50)]


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, ["self_attn.q_proj.bias", "lm_head.weight", "mlp.down_proj.weight"], ["q_norm", "experts"]),
        ({"tied": True}, ["model.embed_tokens.weight"], ["lm_head"]),
        ({"qkv_bias": False, "qk_norm": True}, ["self_attn.k_norm.weight"], ["bias"]),
        ({"num_experts": 3}, ["mlp.experts.2.up_proj.weight"], ["mlp.up_proj", "experts.3"]),
    ],
    ids=["qwen2", "tied", "qwen3", "experts"],
)
def test_tensors_of_a_model(changes: dict[str, object], present: list[str], absent: list[str]) -> None:
    found = dict(name_table.hf_tensors(dataclasses.replace(MODEL, **changes)))
    for name in present:
        assert any(tensor.endswith(name) for tensor in found)
    for name in absent:
        assert not any(name in tensor for tensor in found)


def test_config_to_architecture_to_arguments_and_back() -> None:
    model = from_hf(CONFIG | {"rope_theta": 1e6}, Path("config.json"), 64)
    assert (model.kv_channels, model.family, model.rotary_base) == (128, "qwen3", 1000000)
    assert from_hf(model.hf_config(), Path("config.json"), 64) == model
    assert from_megatron(model.megatron_args(), Path("root"), 64) == model
    args = vars(model.megatron_args())
    assert not [name for name in ARCHITECTURE.values() if name not in args]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 60}, "is a Mixture-of-Experts"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is a Mixture-of-Experts"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM is not covered"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Classification is not covered"),
        ({"model_type": None, "architectures": None}, "None is not covered"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\)"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_attention are not covered"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention are not covered"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn' is not covered"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is no whole number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not covered"),
        ({"attention_bias": True}, "attention_bias is not covered"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"hidden_size": 24.5}, "hidden_size is 24.5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide num_attention_heads 6"),
        ({"rope_parameters": [1]}, "an entry of the wrong kind"),
        ({"architectures": 7}, "an entry of the wrong kind"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{message}") as error:
        from_hf(CONFIG | changes, Path("config.json"), 128)
    assert "\n" not in str(error.value)


def test_a_window_that_no_layer_uses_is_covered() -> None:
    """As in the config.json of Qwen2.5: switched off, or beginning after the last layer."""
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 1}
    assert from_hf(CONFIG | unused, Path("config.json"), 1).num_layers == 2
    after = {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 2}
    assert from_hf(CONFIG | after, Path("config.json"), 1).num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm' where a Qwen class has 'RMSNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"qk_layernorm": True}, "both QKV bias and query/key norms"),
        ({"add_qkv_bias": False}, "neither QKV bias nor query/key norms"),
        ({"multi_latent_attention": True}, "--multi-latent-attention True"),
        ({"num_experts": 4, "moe_router_score_function": "sigmoid"}, "moe_router_score_function 'sigmoid'"),
        ({"num_experts": 4, "moe_router_num_groups": 2}, "moe_router_num_groups 2"),
        ({"num_layers": "many"}, "do not give the architecture"),
    ],
)
def test_a_checkpoint_that_no_class_holds(changes: dict[str, object], message: str) -> None:
    args = Namespace(**vars(MODEL.megatron_args()) | changes)
    with pytest.raises(UserError, match=f"^root: .*{message}"):
        from_megatron(args, Path("root"), 64)


@given(rows=st.integers(1, 300), row_bytes=st.integers(1, 1 << 26))
def test_blocks_cover_every_row_once(rows: int, row_bytes: int) -> None:
    found = list(blocks(rows, row_bytes))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == rows


def test_cast_refuses_what_a_dtype_cannot_hold() -> None:
    values = torch.tensor([1.0, -70000.0])
    assert torch.equal(cast(values, torch.bfloat16, "x"), values.bfloat16())
    with pytest.raises(UserError, match="x: holds values too large for float16"):
        cast(values, torch.float16, "x")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(UserError, match="x: holds NaN or infinite values"):
            cast(torch.tensor([1.0, bad]), torch.float32, "x")


def test_gates_of_a_router() -> None:
    model = dataclasses.replace(MODEL, num_experts=6)

    def gates(**options: object) -> Gates:
        return Gates.of(RouterConfig(num_experts=6, **options), model)

    assert (gates(router="linear").num_rows, gates().num_rows) == (6, 6)
    assert gates(pooling="max").num_rows == 36
    assert (gates(num_routers=30).num_rows, gates(num_routers=30).keys_per_expert) == (30, 5)


def test_rounding_counts_choices_as_loops_do() -> None:
    router = RouterConfig(router="linear", num_experts=4, top_k=2)
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(4, 8, generator=generator) * 1e-3 + torch.randn(8, generator=generator)  # close rivals
    norm = torch.rand(8, generator=generator) + 0.5
    rounding = Rounding()
    rounding.add(gate, norm, router, 1, 0, torch.bfloat16)

    tokens = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)) * norm
    changed = 0
    for token in tokens.bfloat16().double().numpy():
        exact, rounded = (
            set(np.argsort(weights.double().numpy() @ token)[-2:]) for weights in (gate, gate.bfloat16())
        )
        changed += len(exact - rounded)
    assert rounding.choices == 2048 and changed > 100
    assert abs(rounding.by_rounding - changed) <= 4  # ties of a rounded gate
    assert rounding.by_arithmetic > rounding.by_rounding / 2
    assert f"changes {rounding.by_rounding} of 2048 top-k choices" in rounding.describe("bfloat16")
