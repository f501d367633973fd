"""Measure the cost of collecting keys: a forward pass that collects them against a plain forward pass.

    python tools/benchmarks/bench_collect_keys.py [--device cpu|cuda] [--json]

One process runs a dense model with Qwen1.5-0.5B's layers and random weights, with Megatron's data pipeline
and schedule, as ``collect_keys`` does. Plain and collecting passes alternate, in reversed order in every
other pair; the ratio is the median of the pairs' ratios, which is robust against other load on the machine.
On the CPU the model has fewer layers and a small vocabulary: the output layer collects nothing, so a large
one would only make the ratio look better.
"""

import contextlib
import json
import statistics
import sys
from argparse import Namespace
from typing import Any

import measuring
import torch

from megatron_router_upcycling.key_statistics import collect
from megatron_router_upcycling.key_statistics.capture import capture_keys
from megatron_router_upcycling.training import device, launch

BOUND = 1.1  # collecting over plain
# Qwen1.5-0.5B, except for the number of layers and the vocabulary.
MODEL = (
    "--hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --kv-channels 64 --add-qkv-bias"
    f" {measuring.QWEN} --hidden-dropout 0 --attention-dropout 0"
    " --mock-data --tokenizer-type NullTokenizer --train-iters 1 --lr 0"
    " --num-layers {layers} --group-query-attention --num-query-groups {groups} --vocab-size {vocabulary}"
    " --seq-length {sequence} --max-position-embeddings {sequence}"
    " --micro-batch-size {batch} --global-batch-size {batch} --device {place}"
)
# (layers, vocabulary, tokens in a sequence, sequences in a batch, more flags)
SIZES = {"cpu": (2, 2048, 512, 1, ""), "cuda": (24, 151936, 4096, 4, " --bf16")}


def measure(options: Namespace) -> dict[str, Any]:
    """Build the model and time pairs of passes; seconds are medians of one global batch."""
    place = device.choose(options.device)
    layers, vocabulary, sequence, batch, more = SIZES[place]
    layers, groups = options.num_layers or layers, options.num_query_groups
    sizes = {"layers": layers, "groups": groups, "vocabulary": vocabulary, "sequence": sequence}
    args = launch.prepare((MODEL + more).format(**sizes, batch=batch, place=place).split()).args
    model = collect.load_model(args)
    data = collect.train_iterators(args, len(model), 2 * (options.repeats + options.warmup))
    sums = collect.new_sums(args)

    def seconds(kind: str) -> float:
        collecting = kind == "collecting"
        capture = capture_keys(model, sums) if collecting else contextlib.nullcontext()
        with capture:
            start = measuring.now()
            collect.forward(args, model, data)
            return measuring.now() - start

    times = measuring.take_turns(seconds, ("plain", "collecting"), options.repeats, options.warmup)
    ratios = measuring.ratios(times["collecting"], times["plain"])
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return vars(options) | {
        "device": place,
        "threads": torch.get_num_threads(),
        "layers": layers,
        "tokens": sequence * batch,
        "plain_seconds": statistics.median(times["plain"]),
        "collecting_seconds": statistics.median(times["collecting"]),
        "ratio": ratio,
        "quartiles": [low, high],
        "bound": BOUND,
    }


def main() -> None:
    parser = measuring.Parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-layers", type=int, help="default: 2 on the CPU, 24 on a GPU")
    groups = "default: 2; 16 is no grouping, the most keys"
    parser.add_argument("--num-query-groups", type=int, default=2, help=groups)
    parser.add_argument("--repeats", type=int, default=25, help="pairs of passes that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="pairs of passes before these")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints a great deal
        result = measure(options)
        torch.distributed.destroy_process_group()
    if options.json:
        print(json.dumps(result))
        return
    low, high = result["quartiles"]
    print(
        f"collecting keys on {result['device']}: {result['ratio']:.3f} times a plain evaluation forward"
        f" (bound {BOUND}; half of the pairs between {low:.3f} and {high:.3f});"
        f" {result['collecting_seconds']:.3f} s against {result['plain_seconds']:.3f} s for"
        f" {result['tokens']} tokens through {result['layers']} layers, medians of {options.repeats} pairs"
    )


if __name__ == "__main__":
    launch.exit_on_user_error(main)
