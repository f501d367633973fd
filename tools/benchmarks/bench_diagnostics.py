"""Measure how much time routing diagnostics add to a training step.

    .venv/bin/python tools/benchmarks/bench_diagnostics.py [--iterations 44] [--hidden-size 256] [--json]

One process trains a mixture of routers on mock data and collects statistics in every other iteration. It
reports two figures: the time spent inside the diagnostics as a share of the iterations that collect, which is
robust against other load on the machine; and the median ratio of neighbouring iterations with and without
collecting, which is not. By default a run collects once in --log-interval iterations, not in each.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import measuring

from megatron_router_upcycling.training import launch, train
from megatron_router_upcycling.training.run_log import collector, measures
from megatron_router_upcycling.training.run_log.listener import RunLog

BOUND = 0.01  # of a step
WARM_UP = 4  # first iterations, which are not counted
FLAGS = (
    "--num-layers {num_layers} --hidden-size {hidden_size} --ffn-hidden-size {ffn} --num-attention-heads 8"
    f" --num-experts 8 --moe-router-topk 2 --router mixture {measuring.QWEN} --moe-router-pre-softmax"
    " --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.02 --lr 1e-3"
    " --lr-decay-style constant --seq-length 256 --max-position-embeddings 256 --micro-batch-size 4"
    " --global-batch-size 8 --train-iters {iterations} --log-interval 1 --eval-iters 0"
    " --eval-interval 1000000 --mock-data --tokenizer-type NullTokenizer --vocab-size 4000"
    " --routing-diagnostics-interval 2"
)


def train_once(options: argparse.Namespace) -> list[tuple[float, float]]:
    """For each iteration, its seconds and its seconds inside the diagnostics. Even iterations collect."""
    flags = FLAGS.format(**vars(options), ffn=11 * options.hidden_size // 4)
    run = launch.prepare(flags.split())
    inside = [0.0]  # seconds in the diagnostics so far
    marks = [(0.0, 0.0)]  # for each iteration, the time of its end, and ``inside`` at that time

    def time_calls(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = measuring.now()
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] += measuring.now() - start

        setattr(owner, name, call)

    time_calls(collector, "_scores")
    time_calls(measures, "routing_sums")
    time_calls(RunLog, "_write_routing")
    install: Callable[[RunLog], None] = RunLog.install

    def install_and_mark(log: RunLog) -> None:
        install(log)
        from megatron.training import training

        after = training.training_log

        def mark(*args: Any, **kwargs: Any) -> Any:
            result = after(*args, **kwargs)
            marks.append((measuring.now(), inside[0]))
            return result

        training.training_log = mark

    setattr(RunLog, "install", install_and_mark)  # noqa: B010 (its type is another)
    train.train(run)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def main() -> int:
    parser = measuring.Parser(__doc__)
    parser.add_argument("--iterations", type=int, default=44, help="half of them collect (default: 44)")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints a great deal
        iterations = train_once(options)[WARM_UP:]
    off, on = iterations[::2], iterations[1::2]  # iteration WARM_UP + 1 is odd
    assert not any(inside for _, inside in off) and all(inside for _, inside in on)
    result = {
        "step_seconds": statistics.median(seconds for seconds, _ in off),
        "inside_share": sum(inside for _, inside in on) / sum(seconds for seconds, _ in on),
        "paired_ratio": statistics.median(a / b for (a, _), (b, _) in zip(on, off, strict=True)),
        "pairs": len(on),
    }
    said = (
        f"{options.num_layers} layers x {options.hidden_size}, 2048 tokens a step in 2 micro-batches,"
        f" {result['step_seconds']:.3f} s\n"
        f"  inside the diagnostics  {result['inside_share']:.2%} of an iteration that collects\n"
        f"  beside one that does not  x {result['paired_ratio']:.4f}, median of {result['pairs']} pairs"
    )
    print(json.dumps(result) if options.json else said)
    return int(result["inside_share"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())
