"""Resume an optimizer with and without expert parallelism, in either direction, and at another learning rate.

At EP 1 Megatron keeps all parameters in one optimizer; at EP > 1 the experts have one of their own, and
``ChainedOptimizer`` holds two. The tensors carry the names of the model's parameters (those of the
distributed optimizer in its fully reshardable form), so that both read each other's. Only the frame around
them differs, the nesting by optimizer with its step and settings, and ``ChainedOptimizer.load_state_dict``
refuses another one. ``install()`` fits the frame before it is loaded, and settles the learning rates in it
(``optimizer_groups``).
"""

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import get_args

from megatron_router_upcycling.training.patches import optimizer_groups, patching

# What a DistributedOptimizer's state dict holds beside the tensors of "param_state".
FRAME = ("optimizer", "param_state_sharding_type", "grad_scaler")


def install() -> None:
    """Let ``ChainedOptimizer.load_state_dict`` take a state of another number of optimizers, or rate."""

    def fitting(load_state_dict: Callable[..., None]) -> Callable[..., None]:
        def call(self: Any, state_dict: Any) -> None:
            fitted = fit(state_dict, self.chained_optimizers)
            _settle(fitted, self.chained_optimizers)
            load_state_dict(self, fitted)

        return call

    patching.wrap("reshard_optimizer", ChainedOptimizer, "load_state_dict", fitting)


def _settle(state_dict: Any, optimizers: list[Any]) -> None:
    """Let groups and saved groups agree on their learning rates, as the flags of the schedule say."""
    frames = [state_dict] if len(optimizers) == 1 else list(state_dict.values())
    if not all(isinstance(frame, dict) and "param_groups" in _torch_state(frame) for frame in frames):
        return  # a form that this package does not know (Megatron-FSDP's)
    args = get_args()
    follow = "checkpoint" if args.use_checkpoint_opt_param_scheduler else None
    optimizer_groups.settle(
        [group for optimizer in optimizers for group in optimizer.optimizer.param_groups],
        [group for frame in frames for group in _torch_state(frame)["param_groups"]],
        "run" if args.override_opt_param_scheduler else follow,
    )


def fit(state_dict: Any, optimizers: list[Any]) -> Any:
    """``state_dict`` in the frame that ``optimizers`` expect: one for all, or one each by position.

    The tensors are already where the optimizers want them (they were asked for by name); the frame, which
    Megatron keeps in the checkpoint's common state, is as it was saved.
    """
    if not isinstance(state_dict, dict):
        return state_dict
    if not all(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers):
        return _fit_plain(state_dict, optimizers)
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


def _fit_plain(state_dict: dict[Any, Any], optimizers: list[Any]) -> dict[Any, Any]:
    """``fit`` for optimizers that keep whole parameters.

    Each brings its tensors and its groups' parameters by number, under its position or, alone, at the top;
    the step and the groups' settings lie where they were saved.
    """
    at_top = {name: value for name, value in state_dict.items() if not isinstance(name, int)}
    by_position = [state_dict[name] for name in sorted(name for name in state_dict if isinstance(name, int))]
    if not (at_top and by_position):
        return state_dict  # saved in the frame that is asked for
    alone = len(optimizers) == 1
    asked, saved = ([at_top], by_position) if alone else (by_position, [at_top])
    for optimizer, own in zip(optimizers, asked, strict=True):
        _take_settings(optimizer, own, saved, optimizers)
    return at_top if alone else dict(enumerate(by_position))


def _take_settings(
    optimizer: Any, own: dict[str, Any], saved: list[dict[str, Any]], optimizers: list[Any]
) -> None:
    """Fill the frame ``own`` of ``optimizer``, one of ``optimizers``, from those that were ``saved``."""
    inner, saved_inner = _torch_state(own), [_torch_state(frame) for frame in saved]
    for frame, torch_state in zip(saved, saved_inner, strict=True):
        if "common_step" in torch_state.get("state", {}):
            inner["state"]["common_step"] = torch_state["state"]["common_step"]
        if "grad_scaler" in frame:
            own["grad_scaler"] = frame["grad_scaler"]
    groups = [group for torch_state in saved_inner for group in torch_state["param_groups"]]
    current = [group for each in optimizers for group in each.optimizer.param_groups]
    same = optimizer_groups.counterparts(current, groups, optimizer_groups.kind_but_expert)
    found = {id(group): other for group, other in same}
    for number, group in enumerate(optimizer.optimizer.param_groups):
        if other := found[id(group)]:  # else _settle says that one is missing
            mark = {name: group[name] for name in ("is_expert_parallel",) if name in group}
            inner["param_groups"][number] = other | mark | inner["param_groups"][number]


def _torch_state(frame: dict[str, Any]) -> dict[str, Any]:
    """What is PyTorch's own: in float32 that is all, beside float32 copies of parameters it is a part."""
    return frame.get("optimizer", frame)
