"""Measure ``router-upcycle import-hf`` and ``export-hf`` against copying the bytes.

    .venv/bin/python tools/benchmarks/bench_hf.py [--layers 24] [--json FILE]

Makes a Hugging Face folder of Qwen1.5-0.5B's shape (1.2 GB) with random bfloat16 values, imports it, and
exports the import, which must give the same tensors. Time is wall time, the best of ``--repeats``, without
importing torch; beside it stands ``cp -r`` of the folder, which reads and writes the same number of bytes,
and the ``sync`` after it, which import and export do by themselves. Memory is the peak of a process's
resident set.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_convert import aside, measure  # type: ignore[import-not-found]  # beside this file

HEADS = 16
TIME_LIMIT = 2.0  # times cp -r and sync
MEMORY_LIMIT_MB = 300.0  # beyond importing the libraries
LIBRARIES = "import torch, numpy, yaml, tqdm"
WEIGHTS = "model.safetensors"


def make_model(folder: Path, layers: int, hidden: int, ffn: int, vocabulary: int) -> None:
    """A dense Qwen2 folder in one file."""
    import torch
    from safetensors.torch import save_file

    from megatron_router_upcycling.hf import config_json, name_table
    from megatron_router_upcycling.hf.architecture import from_flags

    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": vocabulary, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = from_flags(config_json.to_flags(config, folder, 128))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in name_table.hf_tensors(model)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def check_equal(left: Path, right: Path) -> None:
    """Both files hold the same tensors, whatever their order.

    Raises:
        SystemExit: they do not.
    """
    from safetensors import safe_open

    with safe_open(left, "pt") as one, safe_open(right, "pt") as other:
        names = sorted(one.keys())
        same = names == sorted(other.keys())
        if not same or any(not one.get_tensor(n).equal(other.get_tensor(n)) for n in names):
            raise SystemExit("bench_hf: import and export changed the model")


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    source, copy, dense, out = (work / name for name in ("hf", "copy", "dense", "out"))
    print(f"making a model of {options.layers} layers ...", file=sys.stderr)
    aside(make_model, source, options.layers, options.hidden, options.ffn, options.vocabulary)
    subprocess.run(["sync"], check=True)
    cli = (sys.executable, "-m", "megatron_router_upcycling.cli")
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}

    def take(name: str, made: Path | None, *command: Any) -> None:
        # Memory of a file just removed is faster to write to than any other: the same for everyone.
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        seconds, peak = measure(*command)
        times.setdefault(name, []).append(seconds)
        memory[name] = max(memory.get(name, 0.0), peak)

    for _ in range(options.repeats):
        take("import libraries", None, sys.executable, "-c", LIBRARIES)
        take("cp -r", copy, "cp", "-r", source, copy)
        take("sync", None, "sync")
        take("import-hf", dense, *cli, "import-hf", source, dense, "--quiet")
        take("export-hf", out, *cli, "export-hf", dense, out, "--quiet")
    aside(check_equal, source / WEIGHTS, out / WEIGHTS)
    best = {name: min(seconds) for name, seconds in times.items()}
    synced = min(map(sum, zip(times["cp -r"], times["sync"], strict=True)))
    result: dict[str, Any] = {
        "model_bytes": (source / WEIGHTS).stat().st_size,
        "seconds": best,
        "peak_memory_mb": memory,
    }
    for name in ("import-hf", "export-hf"):
        seconds = best[name] - best["import libraries"]
        result[name] = {
            "seconds_beyond_imports": seconds,
            "ratio_to_cp": seconds / best["cp -r"],
            "ratio_to_cp_and_sync": seconds / synced,
            "memory_beyond_imports_mb": memory[name] - memory["import libraries"],
        }
    return result


def report(result: dict[str, Any]) -> str:
    lines = [f"model: {result['model_bytes'] / 1e9:.3f} GB"]
    lines += [f"  {name:<20} {seconds:7.2f} s" for name, seconds in result["seconds"].items()]
    for name in ("import-hf", "export-hf"):
        row = result[name]
        lines.append(
            f"{name}: {row['seconds_beyond_imports']:.2f} s beyond importing the libraries"
            f" = {row['ratio_to_cp_and_sync']:.2f} x cp -r and sync (limit {TIME_LIMIT}),"
            f" {row['ratio_to_cp']:.2f} x cp -r alone;"
            f" {row['memory_beyond_imports_mb']:+.0f} MB beyond them (limit +{MEMORY_LIMIT_MB:.0f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-hf-", dir=options.folder) as work:
        result = run(Path(work), options)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
