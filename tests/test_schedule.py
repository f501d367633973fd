"""The paper's schedule against its definition, step by step (section 4.1)."""

import pytest
import torch


@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_warmup_then_two_steps_down(min_lr: float) -> None:
    from megatron_router_upcycling.schedule import STYLE, StepDecayScheduler

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
