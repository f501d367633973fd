"""Load a checkpoint into a model to whose layers flags, or Transformer Engine, add tensors or states.

Added router biases start from zero, as in a new run; missing extra states of Transformer Engine (fp8 scales)
are not loaded. Any other missing tensor raises a UserError that names the flag which adds it.
"""

import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.format.files import read_record
from megatron_router_upcycling.checkpoint.format.metadata import METADATA, parse_metadata
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches import patching

# Tensors that start from zero if the checkpoint lacks them: end of the name -> the flag that adds it.
FROM_ZERO = {
    "router.expert_bias": "--moe-router-enable-expert-bias",
    "router.qb_beta": "--moe-router-load-balancing-type quantile_balancing",
}
# Megatron's message about a tensor that has another shape in the checkpoint.
SHAPES = re.compile(
    r"shape mismatch for loaded \(torch\.Size\((?P<saved>\[.*?\])\)\) and expected \((?P<asked>\(.*?\))\)"
    r" tensor for key (?P<key>\S+)"
)
WAY_OUT = "leave out the flags that make it another model than the checkpoint's"


def install() -> None:
    """Wrap ``dist_checkpointing.load``."""
    patching.wrap("added_state", dist_checkpointing, "load", _of_what_is_there)


def _of_what_is_there(
    load: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any
) -> Any:
    path = Path(str(checkpoint_dir)) / METADATA
    if not path.is_file():
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    saved, objects = parse_metadata(read_record(path), path)
    by_rank: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, set(_keys(sharded_state_dict)))
    asked = set().union(*by_rank)  # each pipeline stage asks for its own layers only
    missing = asked - set(saved)
    if others := sorted(key for key in missing if not key.endswith(tuple(FROM_ZERO))):
        raise UserError(f"{added_by(others[0], saved)}: {path.parent} has no {others[0]}; {WAY_OUT}")
    _tell(missing, "the checkpoint has no such bias; it begins at zero")
    left_out = {key for key in set(saved) - asked if not key.startswith("optimizer.")}
    _tell(left_out, "is not given, and the checkpoint has such a bias; it is left out")
    added, wanted = extract_matching_values(
        without_missing_states(sharded_state_dict, objects),
        lambda value: isinstance(value, ShardedTensor) and value.key in missing,
    )
    try:
        loaded = load(wanted, checkpoint_dir, *args, **kwargs)
    except CheckpointException as error:  # holds the failure of each rank
        shapes = [SHAPES.search(str(failure)) for failure, _ in error.failures.values()]
        if not all(shapes) or (found := shapes[0]) is None:
            raise
        raise UserError(
            f"--load: {path.parent} has {found['key']} in the shape {found['saved']},"
            f" and these flags make it {found['asked']}; {WAY_OUT}"
        ) from None
    return merge(loaded, _own_values(added))


def without_missing_states(sharded_state_dict: Any, saved: Container[str]) -> Any:
    """``sharded_state_dict`` without the extra states that are not in ``saved``."""

    def is_missing(value: Any) -> bool:
        is_state = isinstance(value, ShardedObject) and value.key.endswith(names.EXTRA_STATE)
        return is_state and value.unique_key not in saved

    return extract_matching_values(sharded_state_dict, is_missing)[1]


def _tell(keys: set[str], what: str) -> None:
    for end, flag in FROM_ZERO.items():
        if torch.distributed.get_rank() == 0 and any(key.endswith(end) for key in keys):
            print(f"{flag}: {what}", flush=True)


def added_by(key: str, saved: Container[str]) -> str:
    """The flag that gives a model the tensor ``key``, which ``saved`` does not hold, for a message."""
    if re.sub(r"\.layers\.\d+\.", ".layers.", key) in saved:
        return "--moe-layer-freq"
    return next((flag for pattern, flag in names.ADDED_BY.items() if re.search(pattern, key)), "--load")


def _keys(sharded_state_dict: dict[str, Any]) -> Iterator[str]:
    """The names of the model's tensors that are asked for."""
    for name, state in sharded_state_dict.items():
        if name.startswith("model") and isinstance(state, dict):
            for value in nested_values(state):
                built = value.build() if isinstance(value, ShardedTensorFactory) else value
                tensors = nested_values(built) if isinstance(built, dict) else [built]
                yield from (tensor.key for tensor in tensors if isinstance(tensor, ShardedTensor))


def _own_values(added: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _own_values(value) if isinstance(value, dict) else value.data for name, value in added.items()
    }
