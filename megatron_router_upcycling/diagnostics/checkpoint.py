"""What a checkpoint is, in words and as a table of its tensors."""

import json
from pathlib import Path

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED
from megatron_router_upcycling.checkpoint.names import EXTRA_STATE, TRAINING_STATE
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import printable, shown

ROUTING = ("num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size")
STATE = ("consumed_train_samples", "tensor_model_parallel_size", "pipeline_model_parallel_size")


def describe(root: str | Path, everything: bool = False) -> str:
    """Kind, architecture, tensors and manifest of the checkpoint under ``root``.

    Args:
        everything: list optimizer state and objects that hold no weights as well.

    Raises:
        UserError: no whole checkpoint there, or one that is not safe to read.
    """
    checkpoint = open_checkpoint(root)
    args = checkpoint.args
    num_experts = getattr(args, "num_experts", None)
    kind = f"Mixture-of-Experts, {shown(num_experts)} experts" if num_experts else "dense"
    iteration = shown(checkpoint.common.get("iteration"))
    lines = [f"{checkpoint.iteration_dir}: {kind}, iteration {iteration}"]

    flags = {**ARCHITECTURE, "num_query_groups": "num_query_groups"}
    values = {flag: getattr(args, name, None) for flag, name in flags.items()}
    values |= {flag: not getattr(args, name, True) for flag, name in NEGATED.items()}
    for title, names in (("routing", ROUTING * bool(num_experts)), ("saved at", STATE)):
        if names:
            found = (f"{name} {shown(getattr(args, name, None))}" for name in names)
            lines.append(f"{title}: " + ", ".join(found))
    lines.append("architecture: " + ", ".join(f"{name} {shown(value)}" for name, value in values.items()))

    lines += ["", f"{'tensor':<72} {'shape':<24} {'dtype':<10} {'bytes':>15} {'stored':>15}"]
    entries = [key for key in checkpoint.tensors if everything or not TRAINING_STATE.match(key)]
    for key in entries:
        tensor = checkpoint.tensors[key]
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored = sum(blob.length for blob in set(checkpoint.blobs(key)))
        lines.append(
            f"{printable(key):<72} {list(tensor.shape)!s:<24} {dtype:<10} {tensor.nbytes:>15,} {stored:>15,}"
        )
    total = sum(checkpoint.tensors[key].nbytes for key in entries)
    stored = sum(blob.length for blob in {blob for key in entries for blob in checkpoint.blobs(key)})
    lines.append(f"{f'{len(entries)} tensors':<108} {total:>15,} {stored:>15,}")
    if everything:
        lines += [
            "",
            *(f"{printable(key):<108} {blob.length:>15,}" for key, blob in checkpoint.objects.items()),
        ]
    else:
        states = sum(EXTRA_STATE in key for key in checkpoint.objects)
        hidden = len(checkpoint.tensors) - len(entries)
        lines.append(f"not shown: {hidden} tensors of training state, {states} extra states (--all)")

    record = manifest.read(checkpoint.root)
    if record is not None:
        lines += ["", f"{manifest.NAME}:", json.dumps(record, indent=2, sort_keys=True)]
    return "\n".join(lines)
