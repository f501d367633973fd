"""Frames of optimizer states that were saved with another number of optimizers.

What a loaded state looks like is megatron-core's: tensors and the groups' parameters where this run's
optimizers asked for them, the step and the groups' settings where the saving run's were.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_router_upcycling.training.patches.reshard_optimizer import fit

SETTINGS = {"max_lr": 0.1, "lr_mult": 1.0, "is_decoupled_lr": False}


def group(expert: bool, **values: Any) -> dict[str, Any]:
    return SETTINGS | {"is_expert_parallel": expert} | values


def optimizer(*groups: dict[str, Any]) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(param_groups=list(groups)))


def wrapped(mixed_precision: bool, torch_state: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """The frame of a float32 optimizer, or of one that keeps float32 copies of its parameters."""
    return {"optimizer": torch_state} | rest if mixed_precision else torch_state


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_two_plain_optimizers_into_one(mixed_precision: bool) -> None:
    current = optimizer(group(False, wd_mult=0.0), group(False, wd_mult=1.0))
    loaded = wrapped(
        mixed_precision,
        {
            "state": {0: {"exp_avg": "a"}, 1: {"exp_avg": "b"}},
            "param_groups": [{"params": [0]}, {"params": [1]}],
        },
    )
    for position, expert in enumerate((False, True)):
        groups = [group(expert, wd_mult=1.0, lr=position), group(expert, wd_mult=0.0, lr=position)]
        loaded[position] = wrapped(
            mixed_precision, {"state": {"common_step": 3}, "param_groups": groups[: 2 - position]}
        )
    fitted = fit(loaded, [current])
    assert not any(isinstance(name, int) for name in fitted)
    torch_state = fitted["optimizer"] if mixed_precision else fitted
    assert torch_state["state"] == {0: {"exp_avg": "a"}, 1: {"exp_avg": "b"}, "common_step": 3}
    assert torch_state["param_groups"] == [
        group(False, wd_mult=0.0, lr=0, params=[0]),
        group(False, wd_mult=1.0, lr=0, params=[1]),
    ]


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_one_plain_optimizer_into_two(mixed_precision: bool) -> None:
    current = [
        optimizer(group(False, wd_mult=0.0), group(False, wd_mult=1.0)),
        optimizer(group(True, wd_mult=1.0)),
    ]
    groups = [group(False, wd_mult=1.0, lr=5), group(False, wd_mult=0.0, lr=6)]
    loaded = wrapped(
        mixed_precision, {"state": {"common_step": 7}, "param_groups": groups}, grad_scaler={"scale": 2.0}
    )
    own = (
        {"state": {0: {"exp_avg": "a"}}, "param_groups": [{"params": [0]}, {"params": [1]}]},
        {"state": {0: {"exp_avg": "b"}}, "param_groups": [{"params": [0]}]},
    )
    fitted = fit(loaded | {i: wrapped(mixed_precision, frame) for i, frame in enumerate(own)}, current)
    assert list(fitted) == [0, 1]
    dense, experts = (fitted[i]["optimizer"] if mixed_precision else fitted[i] for i in (0, 1))
    assert dense["state"] == {0: {"exp_avg": "a"}, "common_step": 7}
    assert experts["state"] == {0: {"exp_avg": "b"}, "common_step": 7}
    assert dense["param_groups"] == [
        group(False, wd_mult=0.0, lr=6, params=[0]),
        group(False, wd_mult=1.0, lr=5, params=[1]),
    ]
    assert experts["param_groups"] == [group(True, wd_mult=1.0, lr=5, params=[0])]
    if mixed_precision:
        assert all(fitted[i]["grad_scaler"] == {"scale": 2.0} for i in (0, 1))


def test_the_frame_that_is_asked_for_stays() -> None:
    alone = {"state": {"common_step": 1}, "param_groups": [group(False, params=[0])]}
    assert fit(alone, [optimizer(group(False))]) is alone
    both = {0: alone, 1: alone}
    assert fit(both, [optimizer(group(False)), optimizer(group(True))]) is both
