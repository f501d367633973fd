"""One rank's shard of a checkpoint into its model, without a word to other ranks.

Megatron's own loading agrees over collectives on who reads what. In a rehearsal the other ranks do not exist,
so this rank reads for itself what its ``sharded_state_dict`` says is its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.format.metadata import StoredTensor
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError


@torch.no_grad()
def load(model: Sequence[Any], root: str) -> int:
    """Fill the parameters of ``model`` (unwrapped chunks) from the checkpoint; returns how many elements.

    Raises:
        UserError: the checkpoint lacks a parameter, has it in another shape, or does not cover this shard.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    checkpoint = open_checkpoint(root)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    count = 0
    for chunk in model:
        state = chunk.sharded_state_dict(metadata=groups)
        apply_factories(state)
        for shard in _leaves(state):
            if isinstance(shard, ShardedTensor):
                stored = checkpoint.tensors.get(shard.key)
                if stored is None:
                    raise UserError(f"--load {root}: has no tensor {shard.key}, which this model asks for")
                count += _fill(shard, stored, checkpoint)
    return count


def _leaves(state: Any) -> Iterator[Any]:
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield value


def _fill(shard: Any, stored: StoredTensor, checkpoint: Checkpoint) -> int:
    """Copy what ``stored`` holds of a ShardedTensor's box into its data."""
    ones = (1,) * (len(shard.global_offset) - len(shard.local_shape))
    box = Box(tuple(shard.global_offset), ones + tuple(shard.local_shape))
    target = shard.data.view(box.sizes)
    filled = 0
    for chunk, part in stored.overlapping(box) if len(stored.shape) == len(box.sizes) else ():
        values = torch.empty(part.sizes, dtype=stored.dtype)
        checkpoint.read_part(chunk, part, values)
        target[part.within(box.offsets)].copy_(values)
        filled += values.numel()
    # The padding of an embedding may differ with the tensor-parallel size.
    if filled != target.numel() and not (shard.allow_shape_mismatch and filled):
        raise UserError(
            f"--load {checkpoint.root}: {shard.key} is {list(stored.shape)} there, which does not cover"
            f" {list(box.sizes)} at {list(box.offsets)} of this rank; use the checkpoint's own architecture"
        )
    return filled
