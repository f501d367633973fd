"""Resume an optimizer with and without expert parallelism, in either direction, and at another learning rate.

At EP 1 Megatron keeps experts and dense parameters in one optimizer; at EP > 1 the experts have one of their
own, and with Muon each of them is two. The tensors carry the names of the model's parameters (those of the
distributed optimizer in its fully reshardable form), so that all read each other's. Only the frame around
them differs, the nesting by optimizer with its step and settings, which Megatron merges by position and
refuses where it is another. ``install()`` keeps the frames that were saved apart, fills this run's from them
by what their groups hold, and settles the learning rates in it (``optimizer_groups``).
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import get_args

from megatron_router_upcycling.training.patches import optimizer_groups, patching

ASKED = "asked for"  # the entry under which tensors are loaded, beside the frames that were saved
# What a frame holds beside PyTorch's state and the tensors that are asked for.
FRAME = ("param_state_sharding_type", "grad_scaler")

type Frame = dict[Any, Any]


def install() -> None:
    """Let ``ChainedOptimizer.load_state_dict`` take a state of another number of optimizers, or rate."""

    def fitting(load_state_dict: Callable[..., None]) -> Callable[..., None]:
        def call(self: Any, state_dict: Any) -> None:
            fitted = fit(state_dict, self.chained_optimizers)
            _settle(fitted, self.chained_optimizers)
            load_state_dict(self, fitted)

        return call

    patching.wrap("reshard_optimizer", dist_checkpointing, "load", _apart)
    patching.wrap("reshard_optimizer", ChainedOptimizer, "load_state_dict", fitting)


def _apart(load: Callable[..., Any]) -> Callable[..., Any]:
    def call(sharded_state_dict: Frame, *args: Any, **kwargs: Any) -> Any:
        asked = sharded_state_dict.get("optimizer")
        if isinstance(asked, dict) and ASKED not in asked:
            sharded_state_dict = sharded_state_dict | {"optimizer": {ASKED: asked}}
        return load(sharded_state_dict, *args, **kwargs)

    return call


def _settle(state_dict: Any, optimizers: list[Any]) -> None:
    """Let groups and saved groups agree on their learning rates, as the flags of the schedule say."""
    saved = [group for frame in frames(state_dict) for group in _torch_state(frame)["param_groups"]]
    if not saved:
        return  # a form that this package does not know (Megatron-FSDP's)
    args = get_args()
    follow = "checkpoint" if args.use_checkpoint_opt_param_scheduler else None
    current = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimizer_groups.settle(current, saved, "run" if args.override_opt_param_scheduler else follow)


def fit(state_dict: Any, optimizers: list[Any]) -> Any:
    """The frame that ``optimizers`` expect, one for all of them or one each by position.

    Args:
        state_dict: the frames that were saved, in their nesting, and under ``ASKED`` those of this run, with
            tensors where the optimizers want them. Without ``ASKED`` it is returned as it is.
    """
    if not isinstance(state_dict, dict) or ASKED not in state_dict:
        return state_dict
    asked = state_dict[ASKED]
    saved = list(frames({name: value for name, value in state_dict.items() if name != ASKED}))
    if not saved:
        return asked
    if len(optimizers) == 1:
        return _fill(optimizers[0], asked, saved)
    return {index: _fill(each, asked.get(index, {}), saved) for index, each in enumerate(optimizers)}


def frames(state: Any) -> Iterator[Frame]:
    """The frames of single optimizers in a state of several, however they are nested."""
    if isinstance(state, dict) and "param_groups" in _torch_state(state):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from frames(value)


def _fill(optimizer: Any, own: Frame, saved: list[Frame]) -> Any:
    """The frame ``own`` of ``optimizer`` with step and settings from those frames that hold its groups."""
    if isinstance(optimizer, ChainedOptimizer):
        return fit({ASKED: own} | dict(enumerate(saved)), optimizer.chained_optimizers)
    if not optimizer.param_groups:
        return own
    frame_of = {id(group): frame for frame in saved for group in _torch_state(frame)["param_groups"]}
    groups = [group for frame in saved for group in _torch_state(frame)["param_groups"]]
    pairs = list(
        optimizer_groups.counterparts(optimizer.param_groups, groups, optimizer_groups.kind_but_expert)
    )
    if any(other is None for _, other in pairs):
        raise optimizer_groups.other_groups()
    frame = frame_of[id(pairs[0][1])]
    inner, saved_inner = _torch_state(own), _torch_state(frame)
    filled = []
    for number, (group, other) in enumerate(pairs):
        assert other is not None
        mark = {name: group[name] for name in ("is_expert_parallel",) if name in group}
        mine = inner.get("param_groups", ())[number : number + 1]
        filled.append(other | mark | (mine[0] if mine else {}))
    step = {k: v for k, v in saved_inner.get("state", {}).items() if k == "common_step"}
    torch_state = saved_inner | inner | {"param_groups": filled}
    if step or "state" in inner:
        torch_state["state"] = inner.get("state", {}) | step
    if "optimizer" not in frame:
        return torch_state
    return {name: frame[name] for name in FRAME if name in frame} | own | {"optimizer": torch_state}


def _torch_state(frame: Frame) -> Frame:
    """What is PyTorch's own: in float32 that is all, beside float32 copies of parameters it is a part."""
    inner = frame.get("optimizer", frame)
    return inner if isinstance(inner, dict) else frame
