"""Measure how memory and time of ``router-upcycle convert`` grow with the model.

    .venv/bin/python tools/benchmarks/bench_convert_scale.py [--folder FOLDER] [--json FILE]

Makes dense checkpoints of the shapes of Qwen models, the larger ones with their first layers only: a layer
more adds chunks and no larger ones, so that memory is that of the whole model. For each: bytes, ``cp -r``,
and a conversion to 8 experts with 8 routers. The largest is 8.5 GB and needs three times that on the disk.
"""

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import measuring  # type: ignore[import-not-found]  # beside this file
from random_checkpoint import Shape, make_dense, make_key_stats  # type: ignore[import-not-found]

EXPERTS = 8
SHAPES = {
    "Qwen2.5-3B, 12 of 36 layers": Shape(12, 2048, 11008, 151936, heads=16, groups=2, head_size=128),
    "Qwen2-72B, 1 of 80 layers": Shape(1, 8192, 29568, 152064, heads=64, groups=8, head_size=128),
    "Qwen2-72B, 2 of 80 layers": Shape(2, 8192, 29568, 152064, heads=64, groups=8, head_size=128),
}


def measure_shape(work: Path, name: str, shape: Shape) -> dict[str, Any]:
    dense, stats, copy, out = (work / made for made in ("dense", "key_stats", "copy", "out"))
    measuring.aside(make_dense, dense, shape)
    measuring.aside(make_key_stats, stats, shape)
    size = measuring.all_bytes(dense)
    copying, syncing = measuring.measure("cp", "-r", dense, copy), measuring.measure("sync")
    measuring.remove(copy)
    libraries = "import torch, numpy, safetensors.torch, tqdm"
    start = measuring.measure(sys.executable, "-c", libraries)
    flags = ("--key-stats", stats, "--num-experts", EXPERTS, "--quiet")
    usage = measuring.measure(*measuring.CLI, "convert", dense, out, *flags)
    result = {
        "name": name,
        "dense_bytes": size,
        "copy_seconds": copying.seconds,
        "copy_cpu_seconds": copying.processor_seconds,
        "sync_seconds": syncing.seconds,
        "seconds": usage.seconds - start.seconds,
        "cpu_seconds": usage.processor_seconds - start.processor_seconds,
        "memory_mb": usage.peak_mb,
        "memory_beyond_imports_mb": usage.peak_mb - start.peak_mb,
        "bytes_written": measuring.new_bytes(out),
    }
    measuring.remove(dense, out)
    stats.unlink()
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
        copying = row["copy_seconds"] + row["sync_seconds"]
        lines.append(
            f"{row['name']:<30} {row['dense_bytes'] / 1e9:5.1f} GB {row['bytes_written'] / 1e9:5.1f} GB"
            f" {row['seconds']:6.1f} s {copying:10.1f} s {row['cpu_seconds']:8.1f} s"
            f" {row['copy_cpu_seconds']:6.1f} s {row['memory_mb']:5.0f} MB"
            f" {row['memory_beyond_imports_mb']:12.0f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    measuring.main(measuring.parser(__doc__), run, report)


if __name__ == "__main__":
    main()
