"""Describe a checkpoint: a summary and a table of its tensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED
from megatron_router_upcycling.checkpoint.described import gives_architecture
from megatron_router_upcycling.checkpoint.names import EXTRA_STATE, TRAINING_STATE, holds_experts
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.read_model import count_experts
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import UserError, printable, shown

ROUTING = ("num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size")
SAVED_AT = ("consumed_train_samples", "tensor_model_parallel_size", "pipeline_model_parallel_size")


def describe(root: str | Path, everything: bool = False, config: Path | None = None) -> str:
    """Kind, architecture, tensors (``everything``: optimizer state too) and manifest of a checkpoint."""
    checkpoint = dataclasses.replace(open_checkpoint(root), config=config)
    listed = [key for key in checkpoint.tensors if everything or not TRAINING_STATE.match(key)]
    record = manifest.read(checkpoint.root)
    lines = [*_summary(checkpoint, record is not None), "", *_table(checkpoint, listed)]
    if everything:
        objects = checkpoint.objects.items()
        lines += ["", *(f"{printable(key):<108} {blob.length:>15,}" for key, blob in objects)]
    else:
        states = sum(EXTRA_STATE in key for key in checkpoint.objects)
        hidden = len(checkpoint.tensors) - len(listed)
        lines.append(f"not shown: {hidden} tensors of training state, {states} extra states (--all)")
    if record is not None:
        lines += ["", f"{manifest.NAME}:", json.dumps(record, indent=2, sort_keys=True)]
    return "\n".join(lines)


def _summary(checkpoint: Checkpoint, recorded: bool) -> list[str]:
    """Kind, routing and architecture, and where these were read; ``recorded``: there is a manifest."""
    iteration = f"iteration {shown(checkpoint.common['iteration'])}" * ("iteration" in checkpoint.common)
    has_experts = holds_experts(checkpoint.tensors)
    parts = [f"{checkpoint.iteration_dir}: dense", iteration]
    if has_experts:
        args = checkpoint.common.get("args")
        count = getattr(args, "num_experts", None) or count_experts(checkpoint)
        experts = f"{shown(count)} experts" if count else ""
        whose = "" if recorded else f"no {manifest.NAME}"
        parts = [f"{checkpoint.iteration_dir}: Mixture-of-Experts", experts, whose, iteration]
    lines = [", ".join(filter(None, parts))]
    if has_experts and not gives_architecture(args):
        return lines
    try:
        args = checkpoint.args
        by = "" if args is checkpoint.common.get("args") else f" (by {checkpoint.described_by})"
    except UserError as error:
        if checkpoint.config:
            raise
        return [*lines, f"architecture: not described ({error})"]
    flags = ARCHITECTURE | {"num_query_groups": "num_query_groups"}
    architecture = {flag: getattr(args, name, None) for flag, name in flags.items()}
    architecture |= {flag: not getattr(args, name) for flag, name in NEGATED.items() if hasattr(args, name)}
    subjects: dict[str, dict[str, Any]] = {
        "routing": {name: getattr(args, name, None) for name in ROUTING if has_experts},
        "saved at": {} if by else {name: getattr(args, name, None) for name in SAVED_AT},
        f"architecture{by}": architecture,
    }
    for subject, values in subjects.items():
        if said := [f"{name} {shown(value)}" for name, value in values.items() if value is not None]:
            lines.append(f"{subject}: {', '.join(said)}")
    return lines


def _table(checkpoint: Checkpoint, keys: list[str]) -> list[str]:
    """Shape, dtype and size of each tensor; experts that share bytes are stored once."""
    lines = [f"{'tensor':<72} {'shape':<24} {'dtype':<10} {'bytes':>15} {'stored':>15}"]
    for key in keys:
        tensor, stored = checkpoint.tensors[key], _stored_bytes(checkpoint, [key])
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(
            f"{printable(key):<72} {list(tensor.shape)!s:<24} {dtype:<10} {tensor.nbytes:>15,} {stored:>15,}"
        )
    total, stored = sum(checkpoint.tensors[key].nbytes for key in keys), _stored_bytes(checkpoint, keys)
    return [*lines, f"{f'{len(keys)} tensors':<108} {total:>15,} {stored:>15,}"]


def _stored_bytes(checkpoint: Checkpoint, keys: list[str]) -> int:
    return sum(blob.length for blob in {blob for key in keys for blob in checkpoint.blobs(key)})
