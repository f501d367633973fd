"""The table of names, read in both directions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_router_upcycling.checkpoint.read_config_json import FIXED_FLAGS
from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.architecture import QwenModel, from_flags
from megatron_router_upcycling.hf.name_table import Tensor
from tests.reference.megatron_ffn import merge_gated_fc1, merge_qkv

FLAGS = FIXED_FLAGS | {
    "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 6,
    "num_query_groups": 2, "kv_channels": 5, "add_qkv_bias": True, "qk_layernorm": False,
    "norm_epsilon": 1e-6, "rotary_base": 10000, "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 32, "init_method_std": 0.02, "vocab_size": 50, "padded_vocab_size": 64,
}  # fmt: skip


def make(**changes: object) -> QwenModel:
    return from_flags(FLAGS | changes)


def tensor_of(key: str, model: QwenModel) -> Tensor:
    (tensor,) = [tensor for tensor in name_table.tensors(model) if tensor.name.endswith(key)]
    return tensor


@settings(deadline=None)  # a busy machine is no mistake
@given(groups=st.integers(1, 4), queries=st.integers(1, 4), size=st.integers(1, 5), columns=st.integers(1, 3))
def test_segments_are_megatrons_layout(groups: int, queries: int, size: int, columns: int) -> None:
    """Against the functions that take the fused tensors apart, and by their inverse, ``runs``."""
    heads = groups * queries
    model = make(num_attention_heads=heads, num_query_groups=groups, kv_channels=size, hidden_size=columns)
    for key, dim in (("linear_qkv.weight", -2), ("linear_qkv.bias", -1), ("mlp.linear_fc1.weight", -2)):
        tensor = tensor_of(key, model)
        parts = [torch.randn(shape) for shape in tensor.part_shapes]
        joined = torch.cat([parts[part][start:stop] for part, start, stop in tensor.segments])
        merged = merge_qkv(*parts, heads, groups, dim) if len(parts) == 3 else merge_gated_fc1(*parts, dim)
        assert torch.equal(joined, merged)
        assert (model.num_layers, *joined.shape) == tensor.shape
        for number, part in enumerate(parts):
            taken = [joined[start:stop] for start, stop in tensor.runs(number)]
            assert torch.equal(torch.cat(taken), part)


def test_padding_is_zeros_after_the_vocabulary() -> None:
    tensor = tensor_of("word_embeddings.weight", make())
    assert tensor.segments == ((0, 0, 50), (None, 50, 64)) and tensor.runs(0) == [(0, 50)]
    assert tensor_of("word_embeddings.weight", make(padded_vocab_size=50)).segments == ((0, 0, 50),)
