"""Groups of parameters: which saved one holds a group's parameters, and whose rates it goes on with."""

from typing import Any

import pytest

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches.optimizer_groups import counterparts, settle


def group(max_lr: float, min_lr: float = 0.0, **others: Any) -> dict[str, Any]:
    kind = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    return kind | {"max_lr": max_lr, "min_lr": min_lr} | others


def test_groups_that_differ_in_their_rates_alone_are_told_apart_by_the_rates_order() -> None:
    """As --use-mup makes them: hidden layers at a fraction of the rate."""
    hidden = {"default_config": False}
    saved = [group(0.1), group(0.1, wd_mult=0.0), group(0.05, **hidden), group(0.01, **hidden)]
    current = [group(0.002, **hidden), group(0.01, **hidden), group(0.02), group(0.02, wd_mult=0.0)]
    found = [other for _, other in counterparts(current, saved)]
    assert found == [saved[3], saved[2], saved[0], saved[1]]


@pytest.mark.parametrize(("follow", "rate"), [("run", 0.02), ("checkpoint", 0.1)])
def test_both_get_the_rates_of_one(follow: str, rate: float) -> None:
    current, saved = group(0.02, 0.002), group(0.1, 0.01)
    settle([current], [saved], follow)
    assert current == saved == group(rate, rate / 10)


def test_a_difference_names_its_flag() -> None:
    own = {"default_config": False}
    settle([group(0.1), group(0.2, **own)], [group(0.1), group(0.2, **own)], None)
    for current, flag in (
        ([group(0.3), group(0.2, **own)], "--lr 0.3, and the checkpoint has 0.1;"),
        ([group(0.1, 0.01), group(0.2, **own)], "--min-lr 0.01, and the checkpoint has 0.0;"),
        ([group(0.1), group(0.3, **own)], "--decoupled-lr 0.3, and the checkpoint has 0.2;"),
    ):
        with pytest.raises(UserError, match=flag):
            settle(current, [group(0.1), group(0.2, **own)], None)


@pytest.mark.parametrize("follow", ["run", "checkpoint", None])
def test_other_groups_than_the_checkpoints_are_one_line(follow: str | None) -> None:
    with pytest.raises(UserError, match="in other groups, .* pass --no-load-optim"):
        settle([group(0.1), group(0.1, default_config=False)], [group(0.1)], follow)
