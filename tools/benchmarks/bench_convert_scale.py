"""Measure how memory and time of ``router-upcycle convert`` grow with the model.

    .venv/bin/python tools/benchmarks/bench_convert_scale.py [--folder FOLDER] [--json FILE]

Makes dense checkpoints with the shapes of Qwen models but only a few of their layers. More layers add more
chunks of the same size, so memory is the same as for the whole model. Measures bytes, ``cp -r``, and a
conversion to 8 experts with 8 routers. The largest is 8.5 GB and needs three times that on the disk.
"""

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import measuring
from random_checkpoint import Shape, make

EXPERTS = 8
SHAPES = {
    "Qwen2.5-3B, 12 of 36 layers": Shape(12, 2048, 11008, 151936, heads=16, groups=2, head_size=128),
    "Qwen2-72B, 1 of 80 layers": Shape(1, 8192, 29568, 152064, heads=64, groups=8, head_size=128),
    "Qwen2-72B, 2 of 80 layers": Shape(2, 8192, 29568, 152064, heads=64, groups=8, head_size=128),
}


def measure_shape(work: Path, name: str, shape: Shape) -> dict[str, Any]:
    copy, out, taken = work / "copy", work / "out", measuring.Commands()
    dense, stats = make(work, shape)
    taken.take("cp -r", "cp", "-r", dense, copy)
    taken.take("sync", "sync")
    measuring.remove(copy)
    taken.take("imports", sys.executable, "-c", "import torch, numpy, safetensors.torch, tqdm")
    flags = ("--key-stats", stats, "--num-experts", EXPERTS, "--quiet")
    taken.take("convert", *measuring.CLI, "convert", dense, out, *flags)
    result = {
        "name": name,
        "dense_bytes": measuring.all_bytes(dense),
        "bytes_written": measuring.new_bytes(out),
        "seconds": taken.seconds(),
        "processor_seconds": taken.processor_seconds(),
        "peak_memory_mb": taken.peak_mb(),
    }
    measuring.remove(dense, out)
    return result


def run(work: Path, options: Namespace) -> list[dict[str, Any]]:
    if shutil.disk_usage(work).free < 30e9:
        print(f"skipped: {work} has less than 30 GB free (--folder names another place)")
        sys.exit()
    results = []
    for name, shape in SHAPES.items():
        print(f"{name} ...", file=sys.stderr)
        results.append(measure_shape(work, name, shape))
    return results


def report(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'convert to 8 experts':<30} {'dense':>8} {'written':>8} {'time':>8} {'cp -r, sync':>12}"
        f" {'processor':>10} {'cp -r':>8} {'memory':>8} {'beyond imports':>15}"
    ]
    for row in results:
        wall, cpu, memory = row["seconds"], row["processor_seconds"], row["peak_memory_mb"]
        lines.append(
            f"{row['name']:<30} {row['dense_bytes'] / 1e9:5.1f} GB {row['bytes_written'] / 1e9:5.1f} GB"
            f" {wall['convert'] - wall['imports']:6.1f} s {wall['cp -r'] + wall['sync']:10.1f} s"
            f" {cpu['convert'] - cpu['imports']:8.1f} s {cpu['cp -r']:6.1f} s"
            f" {memory['convert']:5.0f} MB {memory['convert'] - memory['imports']:12.0f} MB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    measuring.main(measuring.Parser(__doc__), run, report)
