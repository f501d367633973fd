"""Optimizers: Muon for stacked matrices, and loading states of another layout, learning rate or library.

Megatron gives Muon all parameters with two axes but embedding and output layer, and AdamW the rest.
Grouped experts [n, out, in] and query maps [m, d', D] are marked with ``layers.STACK``: Muon updates and
orthogonalises each of their matrices separately, as it does when experts are stored one by one.

At EP 1 Megatron keeps experts and dense parameters in one optimizer; at EP > 1 experts have their own, and
with Muon each of these is two. A state's tensors have the model's names, but the frame around them (nesting
by optimizer, step and settings) differs, and Megatron merges frames by position. Here the saved frames are
kept separate, and fill this run's frames by matching the groups that they hold (``schedule.counterparts``).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import dist_checkpointing, optimizer
from megatron.core.optimizer import distrib_optimizer, emerging_optimizers, layer_wise_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.training import get_args

from megatron_router_upcycling.layers import STACK
from megatron_router_upcycling.training import schedule
from megatron_router_upcycling.training.patches import patching

ASKED = "asked for"  # the entry under which this run's tensors are loaded, next to the saved frames
# Other entries of a frame, besides PyTorch's state and the tensors that are asked for.
FRAME = ("param_state_sharding_type", "grad_scaler")

type Frame = dict[Any, Any]


def install(has_te: bool) -> None:
    """Wrap the functions that load a checkpoint and that load an optimizer's state from it."""
    wrap = functools.partial(patching.wrap, "optimizer")
    wrap(dist_checkpointing, "load", _frames_apart)
    wrap(ChainedOptimizer, "load_state_dict", _fitting)
    if has_te:
        from transformer_engine.pytorch.optimizers import FusedAdam

        wrap(FusedAdam, "load_state_dict", _with_own_defaults)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        # For exact resuming with PyTorch's Adam, which keeps its step as a tensor.
        wrap(distrib_optimizer.DistributedOptimizer, "state_dict", _give_first_step)
        wrap(distrib_optimizer.DistributedOptimizer, "load_state_dict", _give_each_its_step)
        wrap(distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", _allow_no_step)


def install_muon() -> None:
    """Replace Megatron's rule for which parameters are matrices, and wrap Muon's orthogonalisation."""
    entries = patching.find("muon", emerging_optimizers, "_EMERGING_OPTIMIZERS")
    others = ParamKey(predicate=ParamPredicate(name="no_matrix", fn=lambda param: not is_matrix(param)))
    entries["muon"].default_param_overrides = {others: {"optimizer": "adam"}}
    for owner in (layer_wise_optimizer, optimizer):
        patching.replace("muon", owner, "is_managed_by_layer_wise_optimizer", is_matrix)
    patching.wrap("muon", emerging_optimizers.TensorParallelMuon, "orthogonalize", _each_alone)


def is_matrix(param: torch.Tensor) -> bool:
    """Whether ``param`` is a matrix, or a stack of them, that Muon updates."""
    axes = 3 if getattr(param, STACK, False) else 2
    return param.dim() == axes and not getattr(param, "is_embedding_or_output_parameter", False)


def _each_alone(
    orthogonalize: Callable[..., torch.Tensor], self: Any, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    if grad.dim() == 2:
        return orthogonalize(self, p, grad, **kwargs)
    return torch.stack([orthogonalize(self, p, matrix, **kwargs) for matrix in grad])


def _frames_apart(load: Callable[..., Any], sharded_state_dict: Frame, *args: Any, **kwargs: Any) -> Any:
    asked = sharded_state_dict.get("optimizer")
    if isinstance(asked, dict) and ASKED not in asked:
        sharded_state_dict = sharded_state_dict | {"optimizer": {ASKED: asked}}
    return load(sharded_state_dict, *args, **kwargs)


def _fitting(load_state_dict: Callable[..., None], self: Any, state_dict: Any) -> None:
    args, fitted = get_args(), fit(state_dict, self.chained_optimizers)
    saved = _groups(frames(fitted))
    if saved:  # empty for formats that this package does not know (Megatron-FSDP's)
        follow = "checkpoint" if args.use_checkpoint_opt_param_scheduler else None
        current = [group for optimizer in self.chained_optimizers for group in optimizer.param_groups]
        schedule.settle(current, saved, "run" if args.override_opt_param_scheduler else follow)
    load_state_dict(self, fitted)


def fit(state_dict: Any, optimizers: list[Any]) -> Any:
    """The frame that ``optimizers`` expect: a single one, or one for each by position.

    ``state_dict`` holds the saved frames, nested as they were saved, and under ``ASKED`` this run's frames,
    with tensors where the optimizers expect them. Without ``ASKED`` it is returned unchanged.
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
    """The frames of single optimizers in ``state``, at any depth of nesting."""
    if isinstance(state, dict) and "param_groups" in _torch_state(state):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from frames(value)


def _fill(optimizer: Any, own: Frame, saved: list[Frame]) -> Any:
    """``optimizer``'s frame ``own`` with step and settings from the ``saved`` frames that hold its groups."""
    if isinstance(optimizer, ChainedOptimizer):
        return fit({ASKED: own} | dict(enumerate(saved)), optimizer.chained_optimizers)
    if not optimizer.param_groups:
        return own
    found = schedule.counterparts(optimizer.param_groups, _groups(saved), schedule.kind_but_expert)
    frame = next(frame for frame in saved if any(group is found[0] for group in _groups([frame])))
    inner, saved_inner = _torch_state(own), _torch_state(frame)
    filled = []
    for number, (group, other) in enumerate(zip(optimizer.param_groups, found, strict=True)):
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


def _groups(saved: Iterator[Frame] | list[Frame]) -> list[Frame]:
    return [group for frame in saved for group in _torch_state(frame)["param_groups"]]


def _torch_state(frame: Frame) -> Frame:
    """PyTorch's state in ``frame``: an entry of it next to float32 copies of parameters, else all of it."""
    inner = frame.get("optimizer", frame)
    return inner if isinstance(inner, dict) else frame


def _with_own_defaults(load_state_dict: Callable[..., Any], self: Any, state_dict: dict[str, Any]) -> Any:
    """Load into Transformer Engine's Adam, which has settings that PyTorch's lacks, and an integer step."""
    groups = [self.defaults | group for group in state_dict["param_groups"]]
    for group in groups:
        step = group.get("step")
        if isinstance(step, float) or (isinstance(step, torch.Tensor) and step.is_floating_point()):
            group["step"] = int(step)
    return load_state_dict(self, state_dict | {"param_groups": groups})


def _give_first_step(state_dict: Callable[..., Any], self: Any) -> Any:
    """Add a step: Megatron calls ``state_dict()`` before loading too, when Adam does not have one yet."""
    inner = self.optimizer
    parameters = [p for group in inner.param_groups for p in group["params"]]
    if any(inner.state.values()) or not parameters:
        return state_dict(self)
    inner.state[parameters[0]] = {"step": torch.zeros(())}
    try:
        return state_dict(self)
    finally:
        inner.state.clear()


@torch.no_grad()  # in float32 the optimizer's shard is a view of the parameter itself
def _give_each_its_step(load_state_dict: Callable[..., Any], self: Any, state_dict: Any) -> None:
    """Copy the step: Megatron gives all parameters the same tensor, which Adam would increment for each."""
    load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


def _allow_no_step(
    set_states: Callable[..., Any], self: Any, model_param: Any, tensors: dict[str, Any]
) -> None:
    """Allow tensors without a step: the fully reshardable format stores the step separately."""
    set_states(self, model_param, {"step": None} | tensors)
