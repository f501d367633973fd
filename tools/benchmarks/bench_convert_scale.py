"""Measure how memory and time of ``router-upcycle convert`` grow with the model.

    .venv/bin/python tools/benchmarks/bench_convert_scale.py [--folder FOLDER] [--json FILE]

Makes dense checkpoints of the shapes of Qwen models, the larger ones with their first layers only: a layer
more adds chunks and no larger ones, so that memory is that of the whole model. For each: bytes, ``cp -r``,
and a conversion to 8 experts with 8 routers. The largest is 8.5 GB and needs three times that on the disk.
"""

import argparse
import json
import shutil
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_convert import aside, measure_all, new_bytes  # type: ignore[import-not-found]  # beside this file

HEAD_SIZE = 128
EXPERTS = 8


@dataclass(frozen=True)
class Shape:
    """A Qwen model's sizes, and how many of its layers to make."""

    name: str
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    layers: int


SHAPES = (
    Shape("Qwen2.5-3B, 12 of 36 layers", 2048, 11008, 16, 2, 151936, 12),
    Shape("Qwen2-72B, 1 of 80 layers", 8192, 29568, 64, 8, 152064, 1),
    Shape("Qwen2-72B, 2 of 80 layers", 8192, 29568, 64, 8, 152064, 2),
)


def make_dense(root: Path, shape: Shape) -> None:
    """A dense checkpoint as Megatron saves it on one rank. All its values are one block of random ones."""
    import torch

    from megatron_router_upcycling.checkpoint.format import torch_save_file
    from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE, TRACKER
    from megatron_router_upcycling.checkpoint.writer import CheckpointWriter

    L, D, F, V = shape.layers, shape.hidden, shape.ffn, shape.vocabulary
    H, G, d = shape.heads, shape.groups, HEAD_SIZE
    block = torch.empty(1 << 24, dtype=torch.bfloat16).normal_(std=0.02)

    def values(*sizes: int) -> Any:
        count = torch.Size(sizes).numel()
        return block.repeat(-(-count // block.numel()))[:count].view(sizes)

    root.mkdir()
    with CheckpointWriter(root / "iter_0000001") as writer:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            writer.write_chunk(key, (V, D), values(V, D), [(0, 0)])
        writer.write_chunk("decoder.final_layernorm.weight", (D,), values(D), [(0,)])
        attention, ffn = "decoder.layers.self_attention", "decoder.layers.mlp"
        for layer in range(L):
            for key, sizes in (
                (f"{attention}.linear_qkv.layer_norm_weight", (D,)),
                (f"{attention}.linear_qkv.weight", ((H + 2 * G) * d, D)),
                (f"{attention}.linear_qkv.bias", ((H + 2 * G) * d,)),
                (f"{attention}.linear_proj.weight", (D, H * d)),
                (f"{ffn}.linear_fc1.layer_norm_weight", (D,)),
                (f"{ffn}.linear_fc2.weight", (D, F)),
            ):
                writer.write_chunk(key, (L, *sizes), values(1, *sizes), [(layer, *(0 for _ in sizes))])
            for row in (0, F):  # gate and up apart
                writer.write_chunk(
                    f"{ffn}.linear_fc1.weight", (L, 2 * F, D), values(1, F, D), [(layer, row, 0)]
                )
        args = Namespace(
            num_layers=L, hidden_size=D, ffn_hidden_size=F, num_attention_heads=H, kv_channels=d,
            group_query_attention=True, num_query_groups=G, add_qkv_bias=True, add_bias_linear=False,
            swiglu=True, normalization="RMSNorm", layernorm_epsilon=1e-6, position_embedding_type="rope",
            rotary_base=1000000, untie_embeddings_and_output_weights=True, init_method_std=0.02,
            num_experts=None, padded_vocab_size=V,
        )  # fmt: skip
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
        writer.add_object(COMMON_STATE, writer.write_object(torch_save_file.dump([common])))
        writer.finish()
    (root / TRACKER).write_text("1")


def make_key_stats(path: Path, shape: Shape) -> None:
    """Random key statistics that fit ``make_dense``."""
    import torch

    from megatron_router_upcycling.key_statistics import file as key_stats_file
    from megatron_router_upcycling.key_statistics.file import KeyStats

    L, G = shape.layers, shape.groups
    metadata = {"num_layers": L, "num_query_groups": G, "kv_channels": HEAD_SIZE, "key_source": "pre_rope"}
    mean = torch.randn(L, G, HEAD_SIZE)
    key_stats_file.save(path, KeyStats(mean, mean.square() + 1, torch.full((L,), 4096), metadata))


def measure_shape(work: Path, shape: Shape) -> dict[str, Any]:
    dense, stats, out = work / "dense", work / "key_stats", work / "out"
    aside(make_dense, dense, shape)
    aside(make_key_stats, stats, shape)
    size = sum(path.stat().st_size for path in dense.rglob("*") if path.is_file())
    result: dict[str, Any] = {"name": shape.name, "dense_bytes": size}
    result["copy_seconds"], result["copy_cpu_seconds"], _ = measure_all("cp", "-r", dense, work / "copy")
    result["sync_seconds"], _, _ = measure_all("sync")
    shutil.rmtree(work / "copy")
    start, start_cpu, base = measure_all(sys.executable, "-c", "import torch, numpy, safetensors.torch, tqdm")
    convert = (sys.executable, "-m", "megatron_router_upcycling.cli", "convert", dense, out, "--quiet")
    seconds, cpu, peak = measure_all(*convert, "--key-stats", stats, "--num-experts", EXPERTS)
    result |= {
        "seconds": seconds - start,
        "cpu_seconds": cpu - start_cpu,
        "memory_mb": peak,
        "memory_beyond_imports_mb": peak - base,
        "bytes_written": new_bytes(out),
    }
    for folder in (dense, out):
        shutil.rmtree(folder)
    stats.unlink()
    return result


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=options.folder) as work:
        if shutil.disk_usage(work).free < 30e9:
            print(f"skipped: {work} has less than 30 GB free (--folder names another place)")
            return
        for shape in SHAPES:
            print(f"{shape.name} ...", file=sys.stderr)
            results.append(measure_shape(Path(work), shape))
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
