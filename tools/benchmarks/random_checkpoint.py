"""Make dense checkpoints of any size with random values, and key statistics that fit them."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen model; the defaults are the heads of Qwen1.5-0.5B."""

    layers: int
    hidden: int
    ffn: int
    vocabulary: int
    heads: int = 16
    groups: int = 16
    head_size: int = 64


def make(work: Path, shape: Shape) -> tuple[Path, Path]:
    """Make a dense checkpoint and key statistics in ``work``, in separate processes."""
    dense, statistics = work / "dense", work / "key_stats.safetensors"
    measuring.aside(make_dense, dense, shape)
    measuring.aside(make_key_stats, statistics, shape)
    return dense, statistics


def make_dense(root: Path, shape: Shape) -> None:
    """Make a dense checkpoint as Megatron saves it on one rank: a chunk a layer, gate and up separate.

    The values are one block of random bfloat16 numbers, repeated; norms are 1.
    """
    from megatron_router_upcycling.checkpoint.format import torch_save_file
    from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
    from megatron_router_upcycling.checkpoint.names import TRACKER
    from megatron_router_upcycling.checkpoint.writer import CheckpointWriter

    root.mkdir()
    with CheckpointWriter(root / "iter_0000001") as writer:
        _write_tensors(writer, shape)
        common = {"args": _arguments(shape), "checkpoint_version": 3.0, "iteration": 1}
        writer.objects[COMMON_STATE] = writer.write_object(torch_save_file.dump([common]))
        writer.finish()
    (root / TRACKER).write_text("1")


def _write_tensors(writer: Any, shape: Shape) -> None:
    import torch

    L, D, F, V = shape.layers, shape.hidden, shape.ffn, shape.vocabulary
    H, G, d = shape.heads, shape.groups, shape.head_size
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    def values(*sizes: int) -> torch.Tensor:
        count = torch.Size(sizes).numel()
        return block.repeat(-(-count // block.numel()))[:count].view(sizes)

    def ones(*sizes: int) -> torch.Tensor:
        return torch.ones(sizes, dtype=torch.bfloat16)

    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        writer.write_chunk(name, (V, D), values(V, D), [(0, 0)])
    writer.write_chunk("decoder.final_layernorm.weight", (D,), ones(D), [(0,)])
    attention, ffn = "decoder.layers.self_attention", "decoder.layers.mlp"
    of_a_layer = {
        f"{attention}.linear_qkv.layer_norm_weight": (D,),
        f"{attention}.linear_qkv.weight": ((H + 2 * G) * d, D),
        f"{attention}.linear_qkv.bias": ((H + 2 * G) * d,),
        f"{attention}.linear_proj.weight": (D, H * d),
        f"{ffn}.linear_fc1.layer_norm_weight": (D,),
        f"{ffn}.linear_fc2.weight": (D, F),
    }
    for layer in range(L):
        for name, sizes in of_a_layer.items():
            made = ones(1, *sizes) if "layer_norm" in name else values(1, *sizes)
            writer.write_chunk(name, (L, *sizes), made, [(layer, *(0 for _ in sizes))])
        for row in (0, F):  # gate and up
            fc1 = f"{ffn}.linear_fc1.weight"
            writer.write_chunk(fc1, (L, 2 * F, D), values(1, F, D), [(layer, row, 0)])


def _arguments(shape: Shape) -> Namespace:
    grouped = shape.groups < shape.heads
    return Namespace(
        num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, num_experts=None,
        num_attention_heads=shape.heads, kv_channels=shape.head_size, group_query_attention=grouped,
        num_query_groups=shape.groups if grouped else 1, add_qkv_bias=True, add_bias_linear=False,
        swiglu=True, normalization="RMSNorm", layernorm_epsilon=1e-6, position_embedding_type="rope",
        rotary_base=1000000, untie_embeddings_and_output_weights=True, init_method_std=0.02,
        max_position_embeddings=32768, padded_vocab_size=shape.vocabulary,
    )  # fmt: skip


def make_key_stats(path: Path, shape: Shape) -> None:
    """Make random key statistics that fit ``make_dense``."""
    import torch

    from megatron_router_upcycling.key_statistics import file as key_stats_file

    metadata = {
        "num_layers": shape.layers, "num_query_groups": shape.groups, "kv_channels": shape.head_size,
        "num_attention_heads": shape.heads, "hidden_size": shape.hidden, "key_source": "pre_rope",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    mean, attended = (
        torch.randn((shape.layers, count, shape.head_size), generator=generator)
        for count in (shape.groups, shape.heads)
    )
    counts = torch.full((shape.layers,), 4096)
    key_stats_file.save(path, key_stats_file.KeyStats(mean, counts, attended, metadata))
