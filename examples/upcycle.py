"""Upcycle a small model from Python, without Megatron and without a GPU, in a few seconds.

    .venv/bin/python examples/upcycle.py [--model HF_DIR] [--output FOLDER]

A Hugging Face folder (by default a random model with the layout of Qwen2.5, made here) becomes a dense
Megatron checkpoint, its average keys are collected, and the checkpoint is converted, verified and inspected.
At the end one layer's router routes a few tokens. For a real model, collect the keys over its training data:
``torchrun -m megatron_router_upcycling.collect_keys``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_router_upcycling import (
    RouterConfig,
    convert_checkpoint,
    inspect_checkpoint,
    load_router,
    verify_checkpoint,
)
from megatron_router_upcycling.hf import importer
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.moments import KeyMoments


def make_small_model(folder: Path) -> None:
    """Save a random model: 2 layers, 8 heads in 4 query groups, hidden size 64."""
    config = transformers.Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def collect_keys(folder: Path, output: Path, batches: int = 2) -> None:
    """Average the keys of every layer and query group over random tokens (section 3.2)."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    groups, layers = config.num_key_value_heads, model.model.layers
    head_size = layers[0].self_attn.head_dim
    moments = KeyMoments(len(layers), groups, head_size)
    for index, layer in enumerate(layers):
        # The key before the rotary embedding, with its bias; behind the key norm where there is one (Qwen3).
        module = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)

        def take(module: Any, inputs: Any, keys: torch.Tensor, index: int = index) -> None:
            moments.add(index, 0, keys.reshape(-1, groups, head_size))

        module.register_forward_hook(take)
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randint(config.vocab_size, (4, 64)))
    described = {
        "num_layers": len(layers),
        "num_query_groups": groups,
        "kv_channels": head_size,
        "num_attention_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "key_source": "pre_rope",
    }
    key_stats_file.save(output, moments.stats(described), overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a Qwen folder in Hugging Face format (default: a random one)"
    )
    parser.add_argument("--output", type=Path, default=Path("example"), help="(default: example)")
    args = parser.parse_args()
    out = args.output
    dense, moe, keys = out / "dense", out / "moe", out / "key_stats.safetensors"

    model = args.model
    if model is None:
        model = out / "hf"
        make_small_model(model)
    importer.run(importer.prepare(model, dense, importer.Options(overwrite=True)))
    collect_keys(model, keys)

    router = RouterConfig(router="mixture", num_experts=8, top_k=2)
    convert_checkpoint(dense, moe, router, keys, overwrite=True)
    findings = verify_checkpoint(dense, moe)
    print(findings.table())
    assert not findings
    print(inspect_checkpoint(moe))

    first = load_router(moe, layer=0)
    hidden = torch.randn(4, first.hidden_size)
    weights, experts = first.route(hidden)
    print("\nfour random tokens in layer 0, by the router that the checkpoint holds:")
    for token in range(len(hidden)):
        shares = zip(experts[token].tolist(), weights[token].tolist(), strict=True)
        print(f"  token {token}: " + ", ".join(f"expert {expert} x {share:.3f}" for expert, share in shares))


if __name__ == "__main__":
    main()
