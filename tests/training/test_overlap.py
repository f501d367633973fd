"""Parameters that are gathered while the forward pass runs: every one has arrived when it is read.

Megatron waits for a gather before it calls the module that owns the parameter. A module whose parameters are
read without calling it is not waited for: the run ends with an assertion, or computes with old values.
"""

import functools

import pytest

from tests import launch, pretrain_as_asked
from tests.router_kinds import EXPERTS, KINDS

ITERATIONS = 4  # the first gather that overlaps with a forward pass is the second iteration's
MODEL = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8 --kv-channels 8 --swiglu
--normalization RMSNorm --add-qkv-bias --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --vocab-size 256 --tokenizer-type NullTokenizer --seq-length 32
--max-position-embeddings 32 --moe-router-pre-softmax --moe-token-dispatcher-type alltoall""".split()
TRAINING = """--micro-batch-size 4 --global-batch-size 8 --use-distributed-optimizer --lr 1e-2 --log-interval 1
--mock-data --eval-iters 0 --eval-interval 100""".split()
# Small buckets: nearly every parameter has its own.
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 500)
EXPERT_CLASSES = {"loop": "SequentialMLP", "grouped": "GroupedExperts"}
BY_DEFAULT = {("mixture", "grouped"), ("mlp", "loop")}


def train(kind: str, experts: str, *flags: object) -> dict[int, float]:
    router = ("--router", kind, "--num-experts", EXPERTS, "--moe-router-topk", KINDS[kind].top_k)
    grouped = ("--moe-grouped-gemm",) if experts == "grouped" else ()
    iterations = ("--train-iters", ITERATIONS)
    program = str(pretrain_as_asked.__file__)
    output = launch.ranks(2, program, *MODEL, *TRAINING, *iterations, *router, *grouped, *flags).ok()
    assert output.text.count(f"experts of layer 1: {EXPERT_CLASSES[experts]}") == 2
    return output.losses


@functools.cache
def losses_without_overlap(kind: str) -> dict[int, float]:
    """With the loop over experts; grouped products differ from it by rounding alone."""
    return train(kind, "loop")


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        pytest.param(kind, experts, marks=() if (kind, experts) in BY_DEFAULT else pytest.mark.slow)
        for kind in KINDS
        for experts in EXPERT_CLASSES
    ],
)
def test_losses_are_those_without_overlap(kind: str, experts: str) -> None:
    expected = losses_without_overlap(kind)
    assert list(expected) == list(range(1, ITERATIONS + 1)) and expected[ITERATIONS] < expected[1]
    assert train(kind, experts, *OVERLAP) == pytest.approx(expected, rel=1e-5)
