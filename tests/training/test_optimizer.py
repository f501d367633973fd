"""An optimizer's state that another run saved: its frames, its groups of parameters and their rates.

What a loaded state looks like is megatron-core's: the frames as they were saved and, apart from them, those
of this run with tensors and the groups' parameters in them.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches.optimizer import ASKED, _with_own_defaults, fit
from megatron_router_upcycling.training.schedule import STYLE, StepDecayScheduler, counterparts, settle

ADAM, MUON, OWN_RATE = {"optimizer": "adam"}, {"momentum": 0.9}, {"default_config": False}


def group(expert: bool = False, max_lr: float = 0.1, min_lr: float = 0.0, **values: Any) -> dict[str, Any]:
    kind = {"lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": expert}
    return kind | {"max_lr": max_lr, "min_lr": min_lr} | values


def optimizer(*groups: dict[str, Any]) -> Any:
    return SimpleNamespace(param_groups=list(groups))


def wrapped(mixed_precision: bool, torch_state: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """The frame of a float32 optimizer, or of one that keeps float32 copies of its parameters."""
    return {"optimizer": torch_state} | rest if mixed_precision else torch_state


def inner(frame: dict[str, Any], mixed_precision: bool) -> dict[str, Any]:
    return frame["optimizer"] if mixed_precision else frame


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_two_optimizers_into_one(mixed_precision: bool) -> None:
    current = optimizer(group(wd_mult=0.0), group(wd_mult=1.0))
    states = {0: {"exp_avg": "a"}, 1: {"exp_avg": "b"}}
    asked = {"state": states, "param_groups": [{"params": [0]}, {"params": [1]}]}
    loaded: dict[Any, Any] = {ASKED: wrapped(mixed_precision, asked)}
    for position, expert in enumerate((False, True)):
        groups = [group(expert, wd_mult=1.0, lr=position), group(expert, wd_mult=0.0, lr=position)]
        saved = {"state": {"common_step": 3}, "param_groups": groups[: 2 - position]}
        loaded[position] = wrapped(mixed_precision, saved)
    fitted = fit(loaded, [current])
    assert not any(isinstance(name, int) for name in fitted) and ASKED not in fitted
    groups = [group(wd_mult=wd, lr=0, params=[number]) for number, wd in enumerate((0.0, 1.0))]
    expected = {"state": states | {"common_step": 3}, "param_groups": groups}
    assert inner(fitted, mixed_precision) == expected


@pytest.mark.parametrize("mixed_precision", [False, True], ids=["fp32", "bf16"])
def test_one_optimizer_into_two(mixed_precision: bool) -> None:
    current = [optimizer(group(wd_mult=0.0), group(wd_mult=1.0)), optimizer(group(True, wd_mult=1.0))]
    groups = [group(wd_mult=1.0, lr=5), group(wd_mult=0.0, lr=6)]
    state = {"state": {"common_step": 7}, "param_groups": groups}
    saved = wrapped(mixed_precision, state, grad_scaler={"scale": 2.0})
    own = (
        {"state": {0: {"exp_avg": "a"}}, "param_groups": [{"params": [0]}, {"params": [1]}]},
        {"state": {0: {"exp_avg": "b"}}, "param_groups": [{"params": [0]}]},
    )
    asked = {i: wrapped(mixed_precision, frame) for i, frame in enumerate(own)}
    fitted = fit(saved | {ASKED: asked}, current)
    assert list(fitted) == [0, 1]
    groups = [group(wd_mult=0.0, lr=6, params=[0]), group(wd_mult=1.0, lr=5, params=[1])]
    experts = [group(True, wd_mult=1.0, lr=5, params=[0])]
    for i, exp_avg, expected in ((0, "a", groups), (1, "b", experts)):
        state = {0: {"exp_avg": exp_avg}, "common_step": 7}
        assert inner(fitted[i], mixed_precision) == {"state": state, "param_groups": expected}
        assert not mixed_precision or fitted[i]["grad_scaler"] == {"scale": 2.0}


def test_muon_and_adam_are_told_apart_however_many_there_are() -> None:
    """EP 1 has Muon and AdamW; EP 2 has a second Muon for experts, between or behind them."""
    saved = {
        0: {"state": {}, "param_groups": [group(**MUON)]},
        1: {"state": {"common_step": 4}, "param_groups": [group(**ADAM)]},
    }
    current = [optimizer(group()), optimizer(group(True)), optimizer(group(**ADAM))]
    frame = {"param_groups": [{"params": [0]}]}
    fitted = fit(saved | {ASKED: dict.fromkeys(range(3), frame)}, current)
    expected = [(False, MUON), (True, MUON), (False, ADAM)]
    found = [fitted[i]["param_groups"] for i in range(3)]
    assert found == [[group(expert, params=[0], **kind)] for expert, kind in expected]
    assert ["common_step" in fitted[i]["state"] for i in range(3)] == [False, False, True]


def test_transformer_engines_adam_gets_its_own_settings_and_whole_steps() -> None:
    saved = {"param_groups": [{"step": torch.tensor(3.0)}, {"lr": 1, "step": 4.0}]}
    own = SimpleNamespace(defaults={"lr": 0, "capturable": False})
    found = _with_own_defaults(lambda self, state: state["param_groups"], own, saved)
    assert found == [{"lr": 0, "capturable": False, "step": 3}, {"lr": 1, "capturable": False, "step": 4}]
    assert all(type(group["step"]) is int for group in found)


def test_a_state_whose_frames_were_not_kept_apart_stays() -> None:
    """That of Megatron's format without tensors by name: a list, or one frame."""
    alone = {"state": {"common_step": 1}, "param_groups": [group(params=[0])]}
    for state in (alone, [alone, alone]):
        assert fit(state, [optimizer(group())]) is state


def test_groups_that_differ_in_their_rates_alone_are_told_apart_by_the_rates_order() -> None:
    """As --use-mup makes them: hidden layers at a fraction of the rate."""
    rates = (0.1, {}), (0.1, {"wd_mult": 0.0}), (0.05, OWN_RATE), (0.01, OWN_RATE)
    saved = [group(max_lr=rate, **others) for rate, others in rates]
    rates = (0.002, OWN_RATE), (0.01, OWN_RATE), (0.02, {}), (0.02, {"wd_mult": 0.0})
    current = [group(max_lr=rate, **others) for rate, others in rates]
    assert counterparts(current, saved) == [saved[3], saved[2], saved[0], saved[1]]


@pytest.mark.parametrize(("follow", "rate"), [("run", 0.02), ("checkpoint", 0.1)])
def test_both_get_the_rates_of_one(follow: str, rate: float) -> None:
    current, saved = group(False, 0.02, 0.002, end_wd=0.2), group(False, 0.1, 0.01, end_wd=1.0)
    settle([current], [saved], follow)
    assert current == saved == group(False, rate, rate / 10, end_wd=10 * rate)


def test_a_difference_names_its_flag() -> None:
    saved = [group(), group(max_lr=0.2, **OWN_RATE)]
    settle([group(), group(max_lr=0.2, **OWN_RATE)], saved, None)
    for current, flag in (
        ([group(max_lr=0.3, **OWN_RATE), group(max_lr=0.3)], "--lr 0.3, and the checkpoint has 0.1;"),
        ([group(min_lr=0.01), saved[1]], "--min-lr 0.01, and the checkpoint has 0.0;"),
        ([group(), group(max_lr=0.3, **OWN_RATE)], "--decoupled-lr 0.3, and the checkpoint has 0.2;"),
    ):
        with pytest.raises(UserError, match=flag):
            settle(current, saved, None)


def test_other_groups_than_the_checkpoints_are_one_line() -> None:
    with pytest.raises(UserError, match="in other groups, .* pass --no-load-optim"):
        settle([group(), group(**OWN_RATE)], [group()], "run")


def scheduler(decay_steps: int, **options: Any) -> StepDecayScheduler:
    values: dict[str, Any] = {"init_lr": 0.0, "max_lr": 5e-4, "min_lr": 0.0, "lr_warmup_steps": 10}
    values |= {"lr_decay_steps": decay_steps, "lr_decay_style": STYLE, "wd_incr_steps": decay_steps}
    values |= {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant"}
    values |= {"use_checkpoint_opt_param_scheduler": False}  # as Megatron's flags have it
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    return StepDecayScheduler(optimizer, **values | options)


@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_the_papers_schedule_warms_up_and_takes_two_steps_down(min_lr: float) -> None:
    paper = scheduler(1000, max_lr=1.0, min_lr=0.5)
    paper.optimizer.param_groups[0] |= {"max_lr": 5e-4, "min_lr": min_lr}  # as Megatron gives every group
    for step in range(1, 1101):
        paper.step(1)
        factor = step / 10 if step <= 10 else 0.316 ** ((step >= 800) + (step >= 900))
        expected = max(5e-4 * factor, min_lr) if step >= 800 else 5e-4 * factor
        assert paper.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_another_schedule_than_the_checkpoints_is_one_line() -> None:
    """Raising --train-iters and resuming, where Megatron asserts."""
    saved = scheduler(64).state_dict()
    with pytest.raises(UserError, match="--lr-wsd-decay-iters: is missing"):
        followed = scheduler(96, use_checkpoint_opt_param_scheduler=True)
        followed.load_state_dict(saved | {"lr_decay_style": "WSD"})
    with pytest.raises(UserError, match="64 for total number .* pass --override-opt-param-scheduler"):
        scheduler(96).load_state_dict(saved)
    followed = scheduler(64, start_wd=0.3, end_wd=0.3, use_checkpoint_opt_param_scheduler=True)
    followed.load_state_dict(saved)
    assert followed.optimizer.param_groups[0]["weight_decay"] == 0.1  # in this step already
    with pytest.raises(UserError, match="value 0.3 and checkpoint value 0.1 for start weight decay"):
        scheduler(64, start_wd=0.3, end_wd=0.3).load_state_dict(saved)
    longer = scheduler(96, override_opt_param_scheduler=True)
    longer.load_state_dict(saved)
    assert longer.lr_decay_steps == 96
