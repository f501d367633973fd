"""Measure ``router-upcycle convert`` against copying the checkpoint.

    .venv/bin/python tools/benchmarks/bench_convert.py [--layers 24] [--json FILE]

Makes a dense torch_dist checkpoint of Qwen1.5-0.5B's shape with random bfloat16 values, then measures in
one run: importing torch, ``cp -r`` (and a ``sync`` after it, since the converter syncs by itself), the
conversion to 8 and to 64 experts, that to 8 experts with real copies (``--materialize``), a straightforward
conversion that loads and saves everything (``plain_upcycle.py``), and Megatron's own ``--moe-use-upcycling``
on a tiny model, if it works. Time is wall time, the best of ``--repeats``; that of a conversion excludes
importing torch. Memory is the peak of a process's resident set.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring
from random_checkpoint import Shape, make

TIME_LIMIT = 1.5  # times cp -r
MEMORY_LIMIT_MB = 100.0  # beyond importing torch.distributed.checkpoint
SIZE_LIMIT = 1.01  # times the dense FFN and the routers
COMPARED = 8  # number of experts in the conversions that are compared with others
# A model small enough to try Megatron's own upcycling without a GPU.
TINY = shlex.split(
    "--device cpu --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4"
    " --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 1"
    " --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 128"
    f" --eval-iters 0 --eval-interval 100 --save-interval 1 --split 100,0,0 {measuring.QWEN}"
)


def try_megatron(work: Path) -> str:
    """Upcycle a tiny model with Megatron's own ``--moe-use-upcycling``; return its time, or its error."""
    pretrain = (sys.executable, "-m", "megatron_router_upcycling.pretrain", *TINY)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def failure(*flags: str) -> str:
        """The last error message of a run that fails; "" if it succeeds."""
        done = subprocess.run([*pretrain, *flags], env=environment, capture_output=True, text=True)
        lines = [line.split("]: ", 1)[-1] for line in (done.stdout + done.stderr).splitlines()]
        said = [line for line in lines if "Error" in line or "error:" in line]
        return (said or ["no message"])[-1] if done.returncode else ""

    if dense := failure("--save", str(work / "tiny")):
        return f"not tried: its dense model cannot be trained here ({dense})"
    upcycling = ("--num-experts", str(COMPARED), "--moe-router-topk", "2", "--moe-use-upcycling")
    start = time.perf_counter()
    moe = failure("--load", str(work / "tiny"), "--save", str(work / "tiny-moe"), *upcycling)
    return f"fails: {moe}" if moe else f"{time.perf_counter() - start:.1f} s, starting included"


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(options.layers, options.hidden, options.ffn, options.vocabulary)
    print(f"making a dense checkpoint of {options.layers} layers ...", file=sys.stderr)
    dense, _ = make(work, shape)
    subprocess.run(["sync"], check=True)
    taken, added = measuring.Commands(), {}
    experts = sorted({COMPARED, *options.experts})
    for _ in range(options.repeats):
        added = beside_a_copy(work, taken, experts)
    other_ways(work, taken)
    return {
        "dense_bytes": measuring.all_bytes(dense),
        "seconds": taken.seconds(),
        "processor_seconds": taken.processor_seconds(),
        "peak_memory_mb": taken.peak_mb(),
        "convert": {count: compare(taken, shape, count, size) for count, size in added.items()},
        "megatron": try_megatron(work) if options.megatron else "not tried",
    }


def convert(work: Path) -> tuple[Any, ...]:
    """The command, without the number of experts."""
    stats = ("--key-stats", work / "key_stats.safetensors")
    return (*measuring.CLI, "convert", work / "dense", work / "out", "--quiet", *stats)


def beside_a_copy(work: Path, taken: Any, experts: list[int]) -> dict[int, int]:
    """One round of the measurements that have limits; return the bytes that each conversion added."""
    out, copy = work / "out", work / "copy"
    for module in ("torch", "torch.distributed.checkpoint"):
        taken.take(f"import {module}", sys.executable, "-c", f"import {module}")
    taken.take("cp -r", "cp", "-r", work / "dense", copy)
    taken.take("sync", "sync")
    measuring.remove(copy)
    added = {}
    for count in experts:
        taken.take(f"convert {count}", *convert(work), "--num-experts", count)
        added[count] = measuring.new_bytes(out)
        measuring.remove(out)
    return added


def other_ways(work: Path, taken: Any) -> None:
    """A plain conversion, and one with real copies."""
    plain, copy = (sys.executable, Path(__file__).with_name("plain_upcycle.py")), work / "copy"
    taken.take("plain conversion", *plain, work / "dense/iter_0000001", copy, COMPARED)
    measuring.remove(copy)
    taken.take("convert --materialize", *convert(work), "--num-experts", COMPARED, "--materialize")
    measuring.remove(work / "out")


def compare(taken: Any, shape: Shape, num_experts: int, added: int) -> dict[str, float]:
    """A conversion compared with ``cp -r``, and its bytes compared with the fewest possible."""
    name, memory = f"convert {num_experts}", taken.peak_mb()
    ffn = 3 * shape.layers * shape.ffn * shape.hidden * 2
    routers = 2 * shape.layers * shape.heads * shape.head_size * (shape.hidden + 1)  # query maps, expert keys
    return taken.against_copy(name, "import torch") | {
        "memory_beyond_import_mb": memory[name] - memory["import torch.distributed.checkpoint"],
        "bytes_added": added,
        "bytes_ratio": added / (ffn + routers),
    }


def report(result: dict[str, Any]) -> str:
    lines = [f"dense checkpoint: {result['dense_bytes'] / 1e9:.3f} GB"]
    lines += [f"  {name:<38} {seconds:7.2f} s" for name, seconds in result["seconds"].items()]
    for num_experts, row in result["convert"].items():
        lines.append(
            f"{num_experts} experts: {row['seconds']:.2f} s beyond importing torch"
            f" = {row['ratio_to_cp']:.2f} x cp -r (limit {TIME_LIMIT}),"
            f" {row['ratio_to_cp_and_sync']:.2f} x cp -r and sync;"
            f" {row['memory_beyond_import_mb']:+.0f} MB beyond importing torch.distributed.checkpoint"
            f" (limit +{MEMORY_LIMIT_MB:.0f}); {row['bytes_added'] / 1e9:.3f} GB added"
            f" = {row['bytes_ratio']:.4f} x dense FFN and routers (limit {SIZE_LIMIT})"
        )
    ours = result["seconds"][f"convert {COMPARED}"]
    lines.append(f"{COMPARED} experts, beside convert, importing torch included:")
    for name in (f"convert {COMPARED}", "cp -r", "convert --materialize", "plain conversion"):
        seconds, memory = result["seconds"][name], result["peak_memory_mb"][name]
        lines.append(
            f"  {name:<43} {seconds:7.1f} s = {seconds / ours:5.1f} x,"
            f" {result['processor_seconds'][name]:6.1f} s of processor time, {memory / 1e3:.2f} GB of memory"
        )
    lines.append(f"  Megatron's --moe-use-upcycling              {result['megatron']}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = measuring.Parser(__doc__)
    measuring.add_size_flags(parser)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    tries = argparse.BooleanOptionalAction
    parser.add_argument("--megatron", action=tries, default=True, help="try its upcycling (half a minute)")
    measuring.main(parser, run, report)
