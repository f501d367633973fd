"""Measure ``router-upcycle import-hf`` and ``export-hf`` against copying the bytes.

    .venv/bin/python tools/benchmarks/bench_hf.py [--layers 24] [--json FILE]

Makes a Hugging Face folder of Qwen1.5-0.5B's shape (1.2 GB) by exporting a checkpoint with random bfloat16
values, imports it, and exports the import, which must give the same tensors. Time is wall time, the best of
``--repeats``, without importing torch. It is compared with ``cp -r`` of the folder, which reads and writes
the same number of bytes, and a ``sync`` after it, since import and export sync by themselves. Memory is the
peak of a process's resident set.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import measuring
from random_checkpoint import Shape, make_dense

TIME_LIMIT = 2.0  # times cp -r and sync
MEMORY_LIMIT_MB = 300.0  # beyond importing the libraries
LIBRARIES = "import torch, numpy, yaml, tqdm"
WEIGHTS = "model.safetensors"


def check_equal(left: Path, right: Path) -> None:
    """End the benchmark unless both files hold the same tensors, whatever their order."""
    from safetensors import safe_open

    with safe_open(left, "pt") as one, safe_open(right, "pt") as other:
        names = sorted(one.keys())
        same = names == sorted(other.keys())
        if not same or any(not one.get_tensor(n).equal(other.get_tensor(n)) for n in names):
            raise SystemExit("bench_hf: import and export changed the model")


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    source, copy, dense, out = (work / name for name in ("hf", "copy", "dense", "out"))
    print(f"making a model of {options.layers} layers ...", file=sys.stderr)
    shape = Shape(options.layers, options.hidden, options.ffn, options.vocabulary)
    measuring.aside(make_dense, dense, shape)
    subprocess.run([*measuring.CLI, "export-hf", dense, source, "--quiet"], check=True)
    subprocess.run(["sync"], check=True)
    taken = measuring.Commands()
    for _ in range(options.repeats):
        taken.take("import libraries", sys.executable, "-c", LIBRARIES)
        # Pages of a file just removed are faster to write to, so each command removes its output first.
        measuring.remove(copy)
        taken.take("cp -r", "cp", "-r", source, copy)
        taken.take("sync", "sync")
        measuring.remove(dense)
        taken.take("import-hf", *measuring.CLI, "import-hf", source, dense, "--quiet")
        measuring.remove(out)
        taken.take("export-hf", *measuring.CLI, "export-hf", dense, out, "--quiet")
    measuring.aside(check_equal, source / WEIGHTS, out / WEIGHTS)
    size, memory = (source / WEIGHTS).stat().st_size, taken.peak_mb()
    result: dict[str, Any] = {"model_bytes": size, "seconds": taken.seconds(), "peak_memory_mb": memory}
    for name in ("import-hf", "export-hf"):
        beyond = {"memory_beyond_imports_mb": memory[name] - memory["import libraries"]}
        result[name] = taken.against_copy(name, "import libraries") | beyond
    return result


def report(result: dict[str, Any]) -> str:
    lines = [f"model: {result['model_bytes'] / 1e9:.3f} GB"]
    lines += [f"  {name:<20} {seconds:7.2f} s" for name, seconds in result["seconds"].items()]
    for name in ("import-hf", "export-hf"):
        row = result[name]
        lines.append(
            f"{name}: {row['seconds']:.2f} s beyond importing the libraries"
            f" = {row['ratio_to_cp_and_sync']:.2f} x cp -r and sync (limit {TIME_LIMIT}),"
            f" {row['ratio_to_cp']:.2f} x cp -r alone;"
            f" {row['memory_beyond_imports_mb']:+.0f} MB beyond them (limit +{MEMORY_LIMIT_MB:.0f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = measuring.Parser(__doc__)
    measuring.add_size_flags(parser)
    measuring.main(parser, run, report)
