"""Lets Transformer Engine load checkpoints that were saved without it.

Its modules ask a checkpoint for an ``_extra_state`` each (fp8 scales; empty without fp8), and its Adam for
settings that PyTorch's does not have. After ``install()`` both load without them; checkpoints saved with
Transformer Engine load as before. In the other direction only one name differs (see ``layer_spec``).
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import FileSystemReader

from megatron_router_upcycling.checkpoint.names import EXTRA_STATE
from megatron_router_upcycling.training.patches import patching


def install() -> None:
    """Wrap ``dist_checkpointing.load`` and ``FusedAdam.load_state_dict``."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    patching.wrap("with_te", dist_checkpointing, "load", _of_what_is_there)
    patching.wrap("with_te", FusedAdam, "load_state_dict", _with_own_defaults)


def _of_what_is_there(load: Callable[..., Any]) -> Callable[..., Any]:
    def call(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        wanted = without_missing_states(sharded_state_dict, checkpoint_dir)
        return load(wanted, checkpoint_dir, *args, **kwargs)

    return call


def _with_own_defaults(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, state_dict: dict[str, Any]) -> Any:
        groups = [self.defaults | group for group in state_dict["param_groups"]]
        for group in groups:
            if isinstance(group.get("step"), float) or _is_float_tensor(group.get("step")):
                group["step"] = int(group["step"])  # PyTorch's Adam counts in floats
        return load_state_dict(self, state_dict | {"param_groups": groups})

    return call


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def without_missing_states(sharded_state_dict: Any, checkpoint_dir: str) -> Any:
    """``sharded_state_dict`` less the extra states that the torch_dist checkpoint does not hold."""
    saved = FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata

    def is_missing(value: Any) -> bool:
        return (
            isinstance(value, ShardedObject)
            and value.key.endswith(EXTRA_STATE)
            and value.unique_key not in saved
        )

    return extract_matching_values(sharded_state_dict, is_missing)[1]
