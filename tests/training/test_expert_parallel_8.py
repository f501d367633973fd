"""Eight experts on eight ranks, and its checkpoint gone on with on other numbers of them."""

from pathlib import Path

import pytest

from tests import launch

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # relative: float32 sums in another order


def test_ep_8_equals_ep_1_and_resumes_at_ep_2_and_at_tp_2_pp_2(
    tmp_path: Path, moe_config: Path, moe: Path
) -> None:
    """One sequence a micro-batch everywhere: the load-balancing loss is one of each micro-batch."""
    save = tmp_path / "ep8"
    steps = ("--micro-batch-size", 1, "--train-iters", 6, "--save-interval", 3, "--eval-iters", 1)
    command = ("pretrain", "--config", moe_config, "--use-distributed-optimizer", *steps)

    unbroken = launch.ranks(1, *command, "--load", moe).ok().losses
    assert list(unbroken) == [1, 2, 3, 4, 5, 6]
    ep8 = launch.ranks(
        8, *command, "--load", moe, "--save", save, "--expert-model-parallel-size", 8
    ).ok().losses  # fmt: skip
    assert ep8 == pytest.approx(unbroken, rel=TOLERANCE)

    (save / "latest_checkpointed_iteration.txt").write_text("3")
    tensor, pipeline = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
    for ranks, layout in (
        (2, ("--expert-model-parallel-size", 2)),
        (4, (*tensor, "--sequence-parallel", *pipeline)),
    ):
        resumed = launch.ranks(ranks, *command, "--load", save, *layout).ok().losses
        assert resumed == pytest.approx({i: ep8[i] for i in (4, 5, 6)}, rel=TOLERANCE), layout
