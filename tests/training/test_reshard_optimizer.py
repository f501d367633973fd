"""Frames of optimizer states that were saved with other optimizers than this run's.

What a loaded state looks like is megatron-core's: the frames as they were saved and, apart from them, those
of this run with tensors and the groups' parameters in them.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches.reshard_optimizer import ASKED, fit

SETTINGS = {"max_lr": 0.1, "lr_mult": 1.0, "is_decoupled_lr": False}
ADAM, MUON = {"optimizer": "adam"}, {"momentum": 0.9}


def group(expert: bool, **values: Any) -> dict[str, Any]:
    return SETTINGS | {"is_expert_parallel": expert} | values


def optimizer(*groups: dict[str, Any]) -> Any:
    return SimpleNamespace(param_groups=list(groups))


def wrapped(mixed_precision: bool, torch_state: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """The frame of a float32 optimizer, or of one that keeps float32 copies of its parameters."""
    return {"optimizer": torch_state} | rest if mixed_precision else torch_state


def inner(frame: dict[str, Any], mixed_precision: bool) -> dict[str, Any]:
    return frame["optimizer"] if mixed_precision else frame


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_two_optimizers_into_one(mixed_precision: bool) -> None:
    current = optimizer(group(False, wd_mult=0.0), group(False, wd_mult=1.0))
    states = {0: {"exp_avg": "a"}, 1: {"exp_avg": "b"}}
    asked = {"state": states, "param_groups": [{"params": [0]}, {"params": [1]}]}
    loaded: dict[Any, Any] = {ASKED: wrapped(mixed_precision, asked)}
    for position, expert in enumerate((False, True)):
        groups = [group(expert, wd_mult=1.0, lr=position), group(expert, wd_mult=0.0, lr=position)]
        loaded[position] = wrapped(
            mixed_precision, {"state": {"common_step": 3}, "param_groups": groups[: 2 - position]}
        )
    fitted = fit(loaded, [current])
    assert not any(isinstance(name, int) for name in fitted) and ASKED not in fitted
    torch_state = inner(fitted, mixed_precision)
    assert torch_state["state"] == states | {"common_step": 3}
    assert torch_state["param_groups"] == [
        group(False, wd_mult=0.0, lr=0, params=[0]),
        group(False, wd_mult=1.0, lr=0, params=[1]),
    ]


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_one_optimizer_into_two(mixed_precision: bool) -> None:
    current = [
        optimizer(group(False, wd_mult=0.0), group(False, wd_mult=1.0)),
        optimizer(group(True, wd_mult=1.0)),
    ]
    groups = [group(False, wd_mult=1.0, lr=5), group(False, wd_mult=0.0, lr=6)]
    saved = wrapped(
        mixed_precision, {"state": {"common_step": 7}, "param_groups": groups}, grad_scaler={"scale": 2.0}
    )
    own = (
        {"state": {0: {"exp_avg": "a"}}, "param_groups": [{"params": [0]}, {"params": [1]}]},
        {"state": {0: {"exp_avg": "b"}}, "param_groups": [{"params": [0]}]},
    )
    asked = {i: wrapped(mixed_precision, frame) for i, frame in enumerate(own)}
    fitted = fit(saved | {ASKED: asked}, current)
    assert list(fitted) == [0, 1]
    dense, experts = (inner(fitted[i], mixed_precision) for i in (0, 1))
    assert dense["state"] == {0: {"exp_avg": "a"}, "common_step": 7}
    assert experts["state"] == {0: {"exp_avg": "b"}, "common_step": 7}
    assert dense["param_groups"] == [
        group(False, wd_mult=0.0, lr=6, params=[0]),
        group(False, wd_mult=1.0, lr=5, params=[1]),
    ]
    assert experts["param_groups"] == [group(True, wd_mult=1.0, lr=5, params=[0])]
    if mixed_precision:
        assert all(fitted[i]["grad_scaler"] == {"scale": 2.0} for i in (0, 1))


def test_muon_and_adam_are_told_apart_however_many_there_are() -> None:
    """EP 1 has Muon and AdamW; EP 2 has a second Muon for experts, between or behind them."""
    saved = {
        0: {"state": {}, "param_groups": [group(False, **MUON)]},
        1: {"state": {"common_step": 4}, "param_groups": [group(False, **ADAM)]},
    }
    current = [optimizer(group(False)), optimizer(group(True)), optimizer(group(False, **ADAM))]
    frame = {"state": {0: {}}, "param_groups": [{"params": [0]}]}
    fitted = fit(saved | {ASKED: dict.fromkeys(range(3), frame)}, current)
    assert [fitted[i]["param_groups"][0] for i in range(3)] == [
        group(False, params=[0], **MUON),
        group(True, params=[0], **MUON),
        group(False, params=[0], **ADAM),
    ]
    assert ["common_step" in fitted[i]["state"] for i in range(3)] == [False, False, True]


def test_a_group_that_was_not_saved_is_one_line() -> None:
    saved = {"state": {}, "param_groups": [group(False)]}
    asked = {"state": {}, "param_groups": [{"params": [0]}]}
    with pytest.raises(UserError, match="its parameters in other groups"):
        fit(saved | {ASKED: asked}, [optimizer(group(False, **ADAM))])


def test_a_state_whose_frames_were_not_kept_apart_stays() -> None:
    """That of Megatron's format without tensors by name: a list, or one frame."""
    alone = {"state": {"common_step": 1}, "param_groups": [group(False, params=[0])]}
    for state in (alone, [alone, alone]):
        assert fit(state, [optimizer(group(False))]) is state
