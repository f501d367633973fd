"""Experts as a loop and as stacked parameters: what either saves, the other resumes."""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.training.run_log import files
from tests import launch, pretrain_as_asked

EXPERT_CLASSES = {"loop": "SequentialMLP", "grouped": "GroupedExperts"}
SAVED, LAST = 4, 8  # iterations


class Layout(NamedTuple):
    """Where experts lie, and whether the optimizer is the distributed one, in its fully reshardable form."""

    ranks: int
    expert_parallel: int
    distributed: bool


ONE, TWO = Layout(1, 1, False), Layout(2, 2, True)
REPLICAS = Layout(2, 1, True)  # each expert on both ranks, which share its optimizer's state
CASES = [
    ("loop", "grouped", TWO, TWO),
    ("grouped", "loop", TWO, TWO),
    ("grouped", "loop", ONE, ONE),
    ("grouped", "grouped", TWO, REPLICAS),
]
SLOW_CASES = [
    *(("grouped", "grouped", layout, layout) for layout in (TWO, Layout(2, 2, False))),
    *(("loop", "grouped", layout, layout) for layout in (ONE, REPLICAS)),
    ("grouped", "loop", REPLICAS, TWO),
    ("loop", "grouped", TWO, Layout(1, 1, True)),
    ("grouped", "loop", Layout(2, 2, False), ONE),
]


def train(config: Path, load: Path, experts: str, layout: Layout, *flags: object) -> dict[int, float]:
    given: list[object] = ["--expert-model-parallel-size", layout.expert_parallel, *flags]
    given += ["--use-distributed-optimizer"] * layout.distributed
    given += ["--moe-grouped-gemm"] * (experts == "grouped")
    program = str(pretrain_as_asked.__file__)
    output = launch.ranks(layout.ranks, program, "--config", config, "--load", load, *given).ok()
    assert f"experts of layer 1: {EXPERT_CLASSES[experts]}" in output.text
    return output.losses


@functools.cache
def unbroken_run(folder: Path, config: Path, moe: Path, experts: str, layout: Layout) -> tuple:
    """From the converted checkpoint: the folder with the run's checkpoints, and its losses."""
    save = folder / f"{experts}, {layout}"
    losses = train(config, moe, experts, layout, "--save", save)
    assert list(losses) == list(range(1, LAST + 1))
    return save, losses


@pytest.mark.parametrize(
    ("saving", "loading", "before", "after"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_a_run_goes_on_with_the_other_experts(
    tmp_path_factory: pytest.TempPathFactory,
    moe_config: Path,
    moe: Path,
    saving: str,
    loading: str,
    before: Layout,
    after: Layout,
) -> None:
    save, losses = unbroken_run(tmp_path_factory.getbasetemp(), moe_config, moe, saving, before)
    found = train(moe_config, save, loading, after, "--ckpt-step", SAVED)
    expected = {iteration: losses[iteration] for iteration in range(SAVED + 1, LAST + 1)}
    same = (saving, before) == (loading, after)
    # Elsewhere the order of float32 sums differs; one step later so do the weights, by as little.
    assert found == pytest.approx(expected, rel=0 if same else 1e-4, abs=0)


def test_a_converted_checkpoint_starts_both_alike(
    tmp_path_factory: pytest.TempPathFactory,
    moe_config: Path,
    moe: Path,
    unbroken: tuple[Path, dict[int, float]],
) -> None:
    """Beside the session's run with the loop: the same losses, diagnostics and tensors in the checkpoints."""
    save, losses = unbroken_run(tmp_path_factory.getbasetemp(), moe_config, moe, "grouped", TWO)
    assert losses == pytest.approx(unbroken[1], rel=1e-4)
    logged, expected = (files.read(root / files.ROUTING)[-1]["rare"] for root in (save, unbroken[0]))
    assert logged["expert_distance"] == pytest.approx(expected["expert_distance"], rel=1e-2)
    ours, theirs = (open_checkpoint(root).tensors for root in (save, unbroken[0]))
    assert {key: tensor.shape for key, tensor in ours.items()} == {k: t.shape for k, t in theirs.items()}
