"""Parameters that are gathered while the forward pass runs: every one has arrived when it is read.

Megatron waits for a gather before it calls the module that owns the parameter. A module whose parameters are
read without calling it is not waited for: the run ends with an assertion, or computes with old values.
"""

import functools
from pathlib import Path

import pytest

from tests import launch, pretrain_as_asked
from tests.router_kinds import EXPERTS, KINDS

ITERATIONS = 4  # the first gather that overlaps with a forward pass is the second iteration's
FLAGS = ("--num-layers", 2, "--eval-iters", 0, "--train-iters", ITERATIONS, "--use-distributed-optimizer")
# Small buckets: nearly every parameter has its own.
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 500)
EXPERT_CLASSES = {"loop": "SequentialMLP", "grouped": "GroupedExperts"}
BY_DEFAULT = {("mixture", "grouped"), ("mlp", "loop")}


def train(config: Path, kind: str, experts: str, *flags: object) -> dict[int, float]:
    """From scratch, on two ranks; the losses."""
    router = ("--router", kind, "--moe-router-topk", KINDS[kind].top_k, "--moe-router-pre-softmax")
    given = [*FLAGS, "--num-experts", EXPERTS, *router, *flags]
    given += ["--moe-grouped-gemm"] * (experts == "grouped")
    output = launch.ranks(2, str(pretrain_as_asked.__file__), "--config", config, *given).ok()
    assert output.text.count(f"experts of layer 1: {EXPERT_CLASSES[experts]}") == 2
    return output.losses


@functools.cache
def losses_without_overlap(config: Path, kind: str) -> dict[int, float]:
    """With the loop over experts; grouped products differ from it by rounding alone."""
    return train(config, kind, "loop")


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        pytest.param(kind, experts, marks=() if (kind, experts) in BY_DEFAULT else pytest.mark.slow)
        for kind in KINDS
        for experts in EXPERT_CLASSES
        if experts == "loop" or kind in ("mixture", "linear")
    ],
)
def test_losses_are_those_without_overlap(moe_config: Path, kind: str, experts: str) -> None:
    expected = losses_without_overlap(moe_config, kind)
    assert list(expected) == list(range(1, ITERATIONS + 1)) and expected[ITERATIONS] < expected[1]
    assert train(moe_config, kind, experts, *OVERLAP) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("experts", ["grouped", pytest.param("loop", marks=pytest.mark.slow)])
def test_overlapped_expert_communication_changes_no_loss(moe_config: Path, experts: str) -> None:
    """Of two micro-batches one goes forward while the other goes back; in bfloat16, which learns as well."""
    flags = ("--bf16", "--expert-model-parallel-size", 2, "--global-batch-size", 16)
    plain, overlapped = (
        train(moe_config, "mixture", experts, *flags, *more)
        for more in ((), ("--overlap-moe-expert-parallel-comm",))
    )
    assert overlapped == plain and len(plain) == ITERATIONS and plain[ITERATIONS] < plain[1]
