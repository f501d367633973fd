"""The paper's schedule against its definition, step by step (section 4.1)."""

from typing import Any

import pytest
import torch

from megatron_router_upcycling.errors import UserError


@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_warmup_then_two_steps_down(min_lr: float) -> None:
    from megatron_router_upcycling.training.schedule import STYLE, StepDecayScheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = StepDecayScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=5e-4,
        min_lr=min_lr,
        lr_warmup_steps=10,
        lr_decay_steps=1000,
        lr_decay_style=STYLE,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )
    for step in range(1, 1101):
        scheduler.step(1)
        if step <= 10:
            expected = 5e-4 * step / 10
        elif step < 800:
            expected = 5e-4
        elif step < 900:
            expected = 5e-4 * 0.316
        else:
            expected = max(5e-4 * 0.316 * 0.316, min_lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_another_schedule_than_the_checkpoints_is_one_line() -> None:
    """Raising --train-iters and resuming, where Megatron asserts."""
    from megatron_router_upcycling.training.schedule import StepDecayScheduler

    def scheduler(decay_steps: int, **options: bool) -> StepDecayScheduler:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        values: dict[str, Any] = {
            "init_lr": 0.0,
            "max_lr": 1e-3,
            "min_lr": 0.0,
            "lr_warmup_steps": 0,
            "start_wd": 0.1,
        }
        values |= {"end_wd": 0.1, "wd_incr_steps": decay_steps, "wd_incr_style": "constant"}
        values |= {"lr_decay_steps": decay_steps, "lr_decay_style": "constant"}
        values |= {"use_checkpoint_opt_param_scheduler": False}  # as Megatron's flags have it
        return StepDecayScheduler(optimizer, **values, **options)

    saved = scheduler(64).state_dict()
    with_its_own_end = {"lr_decay_style": "WSD"}
    with pytest.raises(UserError, match="--lr-wsd-decay-iters: is missing"):
        followed = scheduler(96)
        followed.use_checkpoint_opt_param_scheduler = True
        followed.load_state_dict(saved | with_its_own_end)
    with pytest.raises(UserError, match="64 for total number .* pass --override-opt-param-scheduler"):
        scheduler(96).load_state_dict(saved)
    scheduler(64).load_state_dict(saved)
    longer = scheduler(96, override_opt_param_scheduler=True)
    longer.load_state_dict(saved)
    assert longer.lr_decay_steps == 96
