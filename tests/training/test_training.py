"""Real runs of the training entry: parallel layouts, saving, resuming, and what a user can get wrong."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_router_upcycling.training.run_log import files
from tests import launch
from tests.conftest import EVALUATE, expert_parallel

PRETRAIN = ("-m", "megatron_router_upcycling.pretrain")


TP_2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP_2 = ("--pipeline-model-parallel-size", 2)


@pytest.mark.parametrize("layout", [TP_2, PP_2], ids=["TP 2", "PP 2"])
def test_dense_model_has_the_same_loss_in_every_layout(
    dense: Path, dense_config: Path, dense_validation: float, layout: tuple[object, ...]
) -> None:
    output = launch.ranks(2, "pretrain", "--config", dense_config, "--load", dense, *EVALUATE, *layout)
    assert output.validation == pytest.approx(dense_validation, rel=1e-5)


def test_killed_run_goes_on_with_the_same_losses(
    tmp_path: Path, moe_config: Path, moe: Path, unbroken: tuple[Path, dict[int, float]]
) -> None:
    command = (2, "pretrain", *expert_parallel(moe_config, moe), "--save", tmp_path / "killed")
    launch.torchrun_killed(*command, when=r"iteration +6/", log=tmp_path / "log")
    losses = launch.ranks(*command).ok().losses
    assert losses == {iteration: unbroken[1][iteration] for iteration in (5, 6, 7, 8)}
    assert list(unbroken[1]) == list(range(1, 9)) and losses[8] < unbroken[1][1]
    # So are the files beside the checkpoints: no line twice, none missing, every value the same.
    for name in (files.RUN, files.ROUTING):
        found, expected = (
            [line | {"time": None} for line in files.read(save / name)]
            for save in (tmp_path / "killed", unbroken[0])
        )
        assert found == expected and len(found) >= 8, name


@pytest.mark.parametrize("layout", [(), PP_2], ids=["EP 1", "PP 2"])
def test_run_saved_at_ep_2_resumes_elsewhere(
    tmp_path: Path, moe_config: Path, unbroken: tuple[Path, dict[int, float]], layout: tuple[object, ...]
) -> None:
    save, losses = unbroken
    flags = ("--config", moe_config, "--load", save, "--ckpt-step", 4, "--save", tmp_path / "save")
    ranks = 2 if layout else 1
    output = launch.ranks(ranks, "pretrain", *flags, "--use-distributed-optimizer", *layout).ok()
    # The order of float32 sums differs; one step later so do the weights, by as little.
    assert output.losses == pytest.approx({step: losses[step] for step in (5, 6, 7, 8)}, rel=1e-4)
    # What the routers did is the same, whichever ranks held layers, experts and tokens.
    found, expected = (files.read(root / files.ROUTING)[-1] for root in (tmp_path / "save", save))
    assert found["iteration"] == 8 and found["layers"] == expected["layers"] == [0, 1, 2, 3]
    for name in ("entropy", "top1_probability", "weight_sum", "load_max_over_mean", "z_loss"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2), name
    for name in ("expert_distance", "gate_cosine"):
        assert found["rare"][name] == pytest.approx(expected["rare"][name], rel=2e-2, abs=1e-3), name


def test_multi_token_prediction_goes_on_over_two_stages(tmp_path: Path, moe_config: Path) -> None:
    """The last stage embeds tokens itself; both stages have the losses of one."""
    router = ("--router", "mixture", "--num-experts", 4, "--mtp-num-layers", 1)
    common = ("--config", moe_config, *router, "--train-iters", 3, "--save-interval", 1)
    losses = launch.ranks(1, "pretrain", *common, "--save", tmp_path).ok().losses
    found = launch.ranks(2, "pretrain", *common, *PP_2, "--load", tmp_path, "--ckpt-step", 1).ok().losses
    assert found == pytest.approx({step: losses[step] for step in (2, 3)}, rel=1e-5)


def test_what_cannot_be_trained_from_leaves_nothing_behind(
    tmp_path: Path, moe: Path, moe_config: Path
) -> None:
    broken, save, absent = shutil.copytree(moe, tmp_path / "broken"), tmp_path / "save", tmp_path / "absent"
    cut = max((broken / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(cut, 1000)
    command = (*PRETRAIN, "--config", moe_config, "--save", save, "--load")
    for flags, message in (
        ((broken,), f"error: {cut}: "),
        ((moe, "--data-path", absent), f"error: --data-path {absent}: no file"),
    ):
        output = launch.python(*command, *flags)
        assert output.returncode == 2
        assert len(output.errors) == 1 and output.errors[0].startswith(message)
        assert "Traceback" not in output.text and not save.exists()


def test_contradicting_the_checkpoint_is_an_error(moe: Path, moe_config: Path) -> None:
    for flag, value in (("--num-experts", 4), ("--hidden-size", 128), ("--num-routers", 4)):
        output = launch.python(*PRETRAIN, "--config", moe_config, "--load", moe, flag, value)
        assert output.returncode == 2
        assert len(output.errors) == 1 and output.errors[0].startswith(f"error: {flag} {value}:")


@pytest.mark.slow
def test_ep_8_equals_ep_1_and_resumes_at_ep_2_and_at_tp_2_pp_2(
    tmp_path: Path, moe_config: Path, moe: Path
) -> None:
    """One sequence a micro-batch everywhere: the load-balancing loss is one of each micro-batch."""
    steps = ("--micro-batch-size", 1, "--train-iters", 6, "--save-interval", 3, "--eval-iters", 1)
    command = ("pretrain", "--config", moe_config, "--use-distributed-optimizer", *steps)
    unbroken = launch.ranks(1, *command, "--load", moe).ok().losses
    assert list(unbroken) == [1, 2, 3, 4, 5, 6]
    saving = ("--load", moe, "--save", tmp_path, "--expert-model-parallel-size", 8)
    ep8 = launch.ranks(8, *command, *saving).ok().losses
    assert ep8 == pytest.approx(unbroken, rel=1e-5)  # float32 sums in another order
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    for ranks, layout in ((2, ("--expert-model-parallel-size", 2)), (4, TP_2 + PP_2)):
        resumed = launch.ranks(ranks, *command, "--load", tmp_path, *layout).ok().losses
        assert resumed == pytest.approx({i: ep8[i] for i in (4, 5, 6)}, rel=1e-5), layout
