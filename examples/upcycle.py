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
from megatron_router_upcycling.key_statistics.moments import KeySums, attending_heads


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
    """Average the keys of every layer and attention head over random tokens (section 3.2)."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    heads, groups, layers = config.num_attention_heads, config.num_key_value_heads, model.model.layers
    head_size = layers[0].self_attn.head_dim
    sums = KeySums(len(layers), heads, groups, head_size)
    for index, layer in enumerate(layers):
        # Before the rotary embedding, with their bias; behind the norms where there are some (Qwen3).
        query_module, key_module = (
            getattr(layer.self_attn, f"{name}_norm", getattr(layer.self_attn, f"{name}_proj"))
            for name in "qk"
        )
        queries: list[torch.Tensor] = []  # transformers computes the key after the query

        def take_query(module: Any, inputs: Any, query: torch.Tensor, queries: Any = queries) -> None:
            queries.append(query)

        def take_key(
            module: Any, inputs: Any, key: torch.Tensor, index: int = index, queries: Any = queries
        ) -> None:
            tokens, query = key.shape[:2], queries.pop()
            query, key = (x.reshape(*tokens, -1, head_size).transpose(0, 1) for x in (query, key))
            sums.add(index, 0, key, attending_heads(query, key))

        query_module.register_forward_hook(take_query)
        key_module.register_forward_hook(take_key)
    with torch.no_grad():
        for _ in range(batches):
            model(torch.randint(config.vocab_size, (4, 64)))
    described = {
        "num_layers": len(layers),
        "num_query_groups": groups,
        "kv_channels": head_size,
        "num_attention_heads": heads,
        "hidden_size": config.hidden_size,
        "key_source": key_stats_file.KEY_SOURCE,
    }
    count = torch.full((len(layers),), sums.tokens)
    stats = key_stats_file.KeyStats(sums.mean(), count, sums.attended(), described)
    key_stats_file.save(output, stats, overwrite=True)


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
    importer.run(importer.prepare(model, dense, overwrite=True))
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
