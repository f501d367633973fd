"""Resume the distributed optimizer with and without expert parallelism, in either direction.

At EP 1 Megatron keeps all parameters in one ``DistributedOptimizer``; at EP > 1 the experts have one of
their own, and ``ChainedOptimizer`` holds two. In the fully reshardable form the tensors carry the names of
the model's parameters, so that both read each other's; only the frame around them differs (megatron-core
0.19: ``ChainedOptimizer.load_state_dict`` raises). ``install()`` fits the frame.
"""

import functools
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

# What a DistributedOptimizer's state dict holds beside the tensors of "param_state".
FRAME = ("optimizer", "param_state_sharding_type", "grad_scaler")


def install() -> None:
    """Let ``ChainedOptimizer.load_state_dict`` take a state saved with another number of optimizers."""
    load_state_dict = ChainedOptimizer.load_state_dict
    if hasattr(load_state_dict, "__wrapped__"):
        return

    @functools.wraps(load_state_dict)
    def call(self: Any, state_dict: Any) -> None:
        load_state_dict(self, fit(state_dict, self.chained_optimizers))

    ChainedOptimizer.load_state_dict = call


def fit(state_dict: Any, optimizers: list[Any]) -> Any:
    """``state_dict`` in the frame that ``optimizers`` expect: one for all, or one each by position.

    The tensors are already where the optimizers want them (they were asked for by name); the frame, which
    Megatron keeps in the checkpoint's common state, is as it was saved.
    """
    distributed = all(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers)
    if not distributed or not isinstance(state_dict, dict):
        return state_dict
    if len(optimizers) == 1 and "optimizer" not in state_dict and 0 in state_dict:
        # Saved with expert parallelism: the dense parameters' frame serves the experts' as well.
        frame = {name: value for name, value in state_dict[0].items() if name in FRAME}
        tensors = {name: value for name, value in state_dict.items() if not isinstance(name, int)}
        return frame | tensors
    if len(optimizers) > 1 and "optimizer" in state_dict:
        frame = {name: value for name, value in state_dict.items() if name in FRAME}
        return {
            index: _frame_for(optimizer, frame) | state_dict.get(index, {})
            for index, optimizer in enumerate(optimizers)
        }
    return state_dict


def _frame_for(optimizer: Any, frame: dict[str, Any]) -> dict[str, Any]:
    """A frame saved for all parameters, its groups marked as this optimizer's are."""
    groups = optimizer.optimizer.param_groups
    expert = any(group.get("is_expert_parallel", False) for group in groups)
    saved = frame["optimizer"]
    marked = [group | {"is_expert_parallel": expert} for group in saved["param_groups"]]
    return frame | {"optimizer": saved | {"param_groups": marked}}
