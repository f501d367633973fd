"""Experts with equal gates and equal weights get equal gradients, and training keeps them equal."""

from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.format.files import locate
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.diagnostics.stored_router import read_router, router_layers
from megatron_router_upcycling.routers.likeness import tied_experts
from megatron_router_upcycling.verify.findings import FRESH_ITERATION

Ties = dict[int, tuple[tuple[int, int], ...]]  # layer -> pairs of experts

NAMED = 8  # experts or layers that a warning names
TOKENS = 64  # random ones, which tell gates apart if anything does


def warn(root: str | Path) -> str | None:
    """The warning about the converted checkpoint in ``root``, before it has trained."""
    root, folder = locate(Path(root))
    record = manifest.read(root)
    if record is None or folder.name != FRESH_ITERATION:
        return None
    checkpoint = open_checkpoint(root)
    router = manifest.router_config(record, checkpoint.root / manifest.NAME)
    tokens = torch.randn(TOKENS, checkpoint.args.hidden_size, generator=torch.Generator().manual_seed(0))
    found = {
        layer: tied_experts(read_router(checkpoint, router, layer).logits(tokens), router.granularity)
        for layer in router_layers(checkpoint)
    }
    warning = describe(found, record)
    return f"warning: {warning}" if warning else None


def describe(ties: Ties, record: dict[str, Any]) -> str | None:
    """Which experts are tied, and what would part them by the manifest ``record``; None where none are."""
    found = {layer: pairs for layer, pairs in ties.items() if pairs}
    router, init = manifest.router_config(record, manifest.NAME), manifest.init_config(record, manifest.NAME)
    if not found or init.alters_experts:
        return None
    stats = (record.get("key_stats") or {}).get("metadata", {})
    shares_keys = stats.get("num_query_groups", 0) < stats.get("num_attention_heads", 0)
    if router.kind.of_heads and init.head_key != "attended" and shares_keys:
        remedy = "convert again with --head-key attended, from key statistics that collect_keys writes now"
    elif router.num_routers is not None and router.num_routers < router.num_copies:
        remedy = f"convert again with --num-routers {router.num_copies}"
    else:
        remedy = "convert again with --config configs/ablations/expert_noise.yaml, whose experts differ"
    layer, pairs = next(iter(found.items()))
    shown = ", ".join(f"{a} and {b}" for a, b in pairs[:NAMED]) + ", ..." * (len(pairs) > NAMED)
    return (
        f"experts are tied in {named(list(found))} (layer {layer}: {shown}): their gates and their weights"
        f" are equal, so that training keeps them equal; {remedy}"
    )


def named(layers: list[int]) -> str:
    """Layers in words, the first of them by number."""
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:NAMED]))}{more}"
