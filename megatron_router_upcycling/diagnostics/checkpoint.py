"""What a checkpoint is, in words and as a table of its tensors."""

import json
from pathlib import Path

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED
from megatron_router_upcycling.checkpoint.names import EXTRA_STATE, TRAINING_STATE
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import printable, shown

ROUTING = ("num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size")
SAVED_AT = ("consumed_train_samples", "tensor_model_parallel_size", "pipeline_model_parallel_size")


def describe(root: str | Path, everything: bool = False) -> str:
    """Kind, architecture, tensors and manifest of the checkpoint under ``root``.

    Args:
        everything: list optimizer state and objects that hold no weights as well.

    Raises:
        UserError: no whole checkpoint there, or one that is not safe to read.
    """
    checkpoint = open_checkpoint(root)
    listed = [key for key in checkpoint.tensors if everything or not TRAINING_STATE.match(key)]
    lines = [*_summary(checkpoint), "", *_table(checkpoint, listed)]
    if everything:
        objects = checkpoint.objects.items()
        lines += ["", *(f"{printable(key):<108} {blob.length:>15,}" for key, blob in objects)]
    else:
        states = sum(EXTRA_STATE in key for key in checkpoint.objects)
        hidden = len(checkpoint.tensors) - len(listed)
        lines.append(f"not shown: {hidden} tensors of training state, {states} extra states (--all)")
    record = manifest.read(checkpoint.root)
    if record is not None:
        lines += ["", f"{manifest.NAME}:", json.dumps(record, indent=2, sort_keys=True)]
    return "\n".join(lines)


def _summary(checkpoint: Checkpoint) -> list[str]:
    """What the training arguments in the checkpoint say, a line a subject."""
    args = checkpoint.args

    def values(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {shown(getattr(args, name, None))}" for name in names)

    num_experts = getattr(args, "num_experts", None)
    kind = f"Mixture-of-Experts, {shown(num_experts)} experts" if num_experts else "dense"
    iteration = shown(checkpoint.common.get("iteration"))
    lines = [f"{checkpoint.iteration_dir}: {kind}, iteration {iteration}"]
    if num_experts:
        lines.append(f"routing: {values(ROUTING)}")
    lines.append(f"saved at: {values(SAVED_AT)}")
    flags = ARCHITECTURE | {"num_query_groups": "num_query_groups"}
    architecture = {flag: getattr(args, name, None) for flag, name in flags.items()}
    architecture |= {flag: not getattr(args, name, True) for flag, name in NEGATED.items()}
    said = ", ".join(f"{name} {shown(value)}" for name, value in architecture.items())
    return [*lines, f"architecture: {said}"]


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
