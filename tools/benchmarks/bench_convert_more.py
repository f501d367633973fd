"""Measure conversions of several dense models, and of a Mixture-of-Experts to more experts.

    .venv/bin/python tools/benchmarks/bench_convert_more.py [--layers 6] [--json FILE]

Makes four dense checkpoints of 0.3 GB with random bfloat16 values. In turns: importing torch, converting the
four to 8 experts, ``cp -r`` of the files that this wrote, with a ``sync``; converting one to 8, and a
Mixture-of-Experts of 8, each with its own bytes, to 16. Time is wall time, the best of ``--repeats``; memory
is the peak of a process's resident set.

Where mergekit is installed (``pip install mergekit``), its ``mergekit-moe`` makes a Hugging Face
Mixture-of-Experts of four Qwen3 folders beside ``import-hf``, ``convert --experts`` and ``export-hf``.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measuring
import yaml
from random_checkpoint import Shape, make_dense

MODELS = 4
TIME_LIMIT = 1.3  # times cp -r of what was written, and sync
MEMORY_LIMIT_MB = 100.0  # beyond importing torch.distributed.checkpoint
SIZE_LIMIT = 1.01  # of a doubling, times the routers' bytes
LINEAR = ("--router", "linear", "--quiet")


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    print(f"making {MODELS} dense checkpoints of {options.layers} layers ...", file=sys.stderr)
    shape = Shape(options.layers, options.hidden, options.ffn, options.vocabulary)
    models = [work / f"dense{number}" for number in range(MODELS)]
    for model in models:
        measuring.aside(make_dense, model, shape)
    subprocess.run(["sync"], check=True)
    taken, moe, out = measuring.Commands(), work / "moe", work / "out"
    convert = (*measuring.CLI, "convert")
    eight = ("--num-experts", 8, *LINEAR)
    subprocess.run([*map(str, (*convert, models[0], moe, *eight, "--materialize"))], check=True)
    written = {}
    for _ in range(options.repeats):
        for module in ("torch", "torch.distributed.checkpoint"):
            taken.take(f"import {module}", sys.executable, "-c", f"import {module}")
        taken.take("four models", *convert, models[0], out, "--experts", *models, *eight)
        written["four models"] = copy_new_files(out, work / "new")
        measuring.remove(out)
        taken.take("cp -r", "cp", "-r", work / "new", work / "copy")
        taken.take("sync", "sync")
        measuring.remove(work / "new", work / "copy")
        taken.take("one model", *convert, models[0], out, *eight)
        measuring.remove(out)
        taken.take("8 to 16 experts", *convert, moe, out, "--num-experts", 16, "--quiet")
        written["8 to 16 experts"] = sum(path.stat().st_size for path in out.rglob("__upcycled_*"))
        measuring.remove(out)
    routers = 16 * shape.layers * shape.hidden * 2
    memory = taken.peak_mb()
    return {
        "dense_bytes": measuring.all_bytes(models[0]),
        "seconds": taken.seconds(),
        "memory_beyond_import_mb": memory["four models"] - memory["import torch.distributed.checkpoint"],
        "written": written,
        "four_models": taken.against_copy("four models", "import torch"),
        "doubling_bytes_ratio": written["8 to 16 experts"] / routers,
        "mergekit": beside_mergekit(work, options),
    }


def copy_new_files(out: Path, folder: Path) -> int:
    """Link what a conversion wrote into ``folder``, for ``cp``; return its bytes."""
    folder.mkdir()
    for path in out.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            os.link(path, folder / path.name)
    return measuring.all_bytes(folder)


def make_qwen3(folder: Path, seed: int, layers: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).bfloat16().save_pretrained(folder)


def beside_mergekit(work: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Seconds and megabytes of both ways from four Hugging Face folders to one; None without mergekit."""
    if importlib.util.find_spec("mergekit") is None:
        return None
    taken, folders = measuring.Commands(), [work / f"hf{number}" for number in range(MODELS)]
    for seed, folder in enumerate(folders):
        measuring.aside(make_qwen3, folder, seed, options.layers)
    experts = [{"source_model": str(folder), "positive_prompts": ["a"]} for folder in folders]
    asked = {
        "base_model": str(folders[0]),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "architecture": "qwen3",
    }
    (work / "mergekit.yaml").write_text(yaml.safe_dump(asked | {"experts": experts}))
    ours = ("import-hf", "convert --experts", "export-hf")
    for _ in range(options.repeats):
        made = [work / f"d{number}" for number in range(MODELS)]
        measuring.remove(*made, work / "m", work / "ours", work / "theirs")
        command = (sys.executable, "-m", "mergekit.scripts.moe", work / "mergekit.yaml", work / "theirs")
        taken.take("mergekit-moe", *command)
        for folder, model in zip(folders, made, strict=True):
            taken.take(f"{ours[0]} {model.name}", *measuring.CLI, ours[0], folder, model, "--quiet")
        convert = ("convert", made[0], work / "m", "--experts", *made, "--num-experts", MODELS, *LINEAR)
        taken.take(ours[1], *measuring.CLI, *convert, "--no-moe-router-pre-softmax")
        taken.take(ours[2], *measuring.CLI, ours[2], work / "m", work / "ours", "--quiet")
    seconds, memory = taken.seconds(), taken.peak_mb()
    return {
        "seconds": seconds,
        "peak_memory_mb": memory,
        "time_ratio": seconds["mergekit-moe"]
        / sum(seconds[name] for name in seconds if name != "mergekit-moe"),
        "memory_ratio": memory["mergekit-moe"]
        / max(memory[name] for name in memory if name != "mergekit-moe"),
    }


def report(result: dict[str, Any]) -> str:
    lines = [f"a dense checkpoint: {result['dense_bytes'] / 1e9:.3f} GB"]
    lines += [f"  {name:<30} {seconds:7.2f} s" for name, seconds in result["seconds"].items()]
    four, written = result["four_models"], result["written"]
    lines.append(
        f"four models to 8 experts: {written['four models'] / 1e9:.3f} GB written in"
        f" {four['ratio_to_cp_and_sync']:.2f} x the time of cp -r of them and sync (limit {TIME_LIMIT}),"
        f" {four['ratio_to_cp']:.2f} x cp -r alone;"
        f" {result['memory_beyond_import_mb']:+.0f} MB beyond importing torch.distributed.checkpoint"
        f" (limit +{MEMORY_LIMIT_MB:.0f})"
    )
    seconds = result["seconds"]
    doubling, dense = (seconds[name] - seconds["import torch"] for name in ("8 to 16 experts", "one model"))
    lines.append(
        f"8 to 16 experts: {doubling / dense:.2f} x the time of converting the dense model;"
        f" {written['8 to 16 experts'] / 1e6:.2f} MB of data written = {result['doubling_bytes_ratio']:.3f} x"
        f" the routers' bytes (limit {SIZE_LIMIT})"
    )
    if (other := result["mergekit"]) is None:
        return "\n".join([*lines, "mergekit-moe: not installed"])
    lines += [
        f"  {name:<30} {seconds:7.2f} s {other['peak_memory_mb'][name]:8.0f} MB"
        for name, seconds in other["seconds"].items()
    ]
    lines.append(
        f"mergekit-moe takes {other['time_ratio']:.2f} x the time of import, conversion and export, and"
        f" {other['memory_ratio']:.2f} x the memory of the largest of them"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = measuring.Parser(__doc__)
    measuring.add_size_flags(parser)
    parser.set_defaults(layers=6, vocabulary=32000)
    measuring.main(parser, run, report)
