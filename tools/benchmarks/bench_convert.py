"""Measure ``router-upcycle convert`` against copying the checkpoint.

    .venv/bin/python tools/benchmarks/bench_convert.py [--layers 24] [--json FILE]

Makes a dense torch_dist checkpoint of Qwen1.5-0.5B's shape with random bfloat16 values, then measures in
one run: importing torch, ``cp -r`` (and the ``sync`` after it, which the converter does by itself), the
conversion to 8 and to 64 experts, the same to 8 with real copies (``--materialize``) and once more after it
was killed at four fifths, a straightforward conversion that loads all and saves all
(``plain_upcycle.py``), and Megatron's own ``--moe-use-upcycling``, on a tiny model, if it works. Time
is wall time, the best of ``--repeats``; a conversion's excludes the time to import torch. Memory is the
peak of a process's resident set.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

HEADS, HEAD_SIZE = 16, 64
TIME_LIMIT = 1.5  # times cp -r
MEMORY_LIMIT_MB = 100.0  # beyond importing torch.distributed.checkpoint
SIZE_LIMIT = 1.01  # times the dense FFN and the routers
WARM_BYTES = 4 << 30  # what a measured command may fill
COMPARED = 8  # experts of the conversions to compare with
# The smallest model that Megatron's own upcycling can be tried on, without a GPU.
TINY = [
    "--device", "cpu", "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "96",
    "--num-attention-heads", "4", "--swiglu", "--seq-length", "16", "--max-position-embeddings", "16",
    "--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-3",
    "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "128", "--disable-bias-linear",
    "--normalization", "RMSNorm", "--position-embedding-type", "rope",
    "--untie-embeddings-and-output-weights", "--eval-iters", "0", "--eval-interval", "100",
    "--save-interval", "1", "--split", "100,0,0",
]  # fmt: skip


def make_dense(root: Path, layers: int, hidden: int, ffn: int, vocabulary: int) -> None:
    """A dense checkpoint as Megatron saves it on one rank: a chunk a layer, gate and up apart."""
    from megatron_router_upcycling.checkpoint.format.files import TRACKER
    from megatron_router_upcycling.checkpoint.writer import CheckpointWriter

    root.mkdir()
    with CheckpointWriter(root / "iter_0000001") as writer:
        _write_dense(writer, layers, hidden, ffn, vocabulary)
        writer.finish()
    (root / TRACKER).write_text("1")


def _write_dense(writer: Any, layers: int, hidden: int, ffn: int, vocabulary: int) -> None:
    import torch

    from megatron_router_upcycling.checkpoint.format import torch_save_file
    from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE

    D, F, d = hidden, ffn, HEAD_SIZE
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        writer.write_chunk(key, (vocabulary, D), values(vocabulary, D), [(0, 0)])
    writer.write_chunk("decoder.final_layernorm.weight", (D,), values(D), [(0,)])
    attention = "decoder.layers.self_attention"
    for layer in range(layers):
        for key, shape in (
            (f"{attention}.linear_qkv.layer_norm_weight", (D,)),
            (f"{attention}.linear_qkv.weight", (3 * HEADS * d, D)),
            (f"{attention}.linear_qkv.bias", (3 * HEADS * d,)),
            (f"{attention}.linear_proj.weight", (D, HEADS * d)),
            ("decoder.layers.mlp.linear_fc1.layer_norm_weight", (D,)),
            ("decoder.layers.mlp.linear_fc2.weight", (D, F)),
        ):
            writer.write_chunk(key, (layers, *shape), values(1, *shape), [(layer, *(0 for _ in shape))])
        for row in (0, F):
            chunk = values(1, F, D)
            writer.write_chunk(
                "decoder.layers.mlp.linear_fc1.weight", (layers, 2 * F, D), chunk, [(layer, row, 0)]
            )
    args = Namespace(
        num_layers=layers, hidden_size=D, ffn_hidden_size=F, num_attention_heads=HEADS, kv_channels=d,
        group_query_attention=False, num_query_groups=1, add_qkv_bias=True, add_bias_linear=False,
        swiglu=True, normalization="RMSNorm", layernorm_epsilon=1e-6, position_embedding_type="rope",
        rotary_base=1000000, untie_embeddings_and_output_weights=True, init_method_std=0.02,
        num_experts=None, padded_vocab_size=vocabulary,
    )  # fmt: skip
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    writer.add_object(COMMON_STATE, writer.write_object(torch_save_file.dump([common])))


def make_key_stats(path: Path, layers: int, hidden: int) -> None:
    """Random key statistics that fit ``make_dense``."""
    import torch

    from megatron_router_upcycling.key_statistics import file as key_stats_file
    from megatron_router_upcycling.key_statistics.file import KeyStats

    metadata = {
        "num_layers": layers, "num_query_groups": HEADS, "kv_channels": HEAD_SIZE,
        "num_attention_heads": HEADS, "hidden_size": hidden, "key_source": "pre_rope",
    }  # fmt: skip
    mean = torch.randn(layers, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    key_stats_file.save(path, KeyStats(mean, mean.square() + 1, torch.full((layers,), 4096), metadata))


def aside(function: Any, *args: Any) -> None:
    """Call in a process of its own: what a process has used counts in the peak of those it starts."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def warm_memory() -> None:
    """Touch memory, and give it back.

    In a virtual machine, a page that was not used lately has to be fetched from the host first. A command
    that is the first to fill its page cache would be charged for that: up to ten times the time of the copy.
    """
    populate = f"mmap.mmap(-1, {WARM_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", f"import mmap; {populate}"], check=False)


def measure(*command: Any) -> tuple[float, float]:
    """Run a command; return its wall time in seconds and its peak memory in MB."""
    seconds, _, peak = measure_all(*command)
    return seconds, peak


def measure_all(*command: Any) -> tuple[float, float, float]:
    """As ``measure``, with the processor time, user and system, between the two."""
    warm_memory()
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def stop_late(out: Path, whole: int, *command: Any) -> None:
    """Run a conversion and kill it when four fifths of ``whole`` bytes are written."""
    process = subprocess.Popen([str(part) for part in command])
    while process.poll() is None:
        files = list(out.parent.glob(f".{out.name}.partial-*/release/__upcycled_*"))
        if sum(path.stat().st_size for path in files) > 0.8 * whole:
            process.kill()
        time.sleep(0.005)
    process.wait()


def try_megatron(work: Path) -> str:
    """Upcycle a tiny model with Megatron's own ``--moe-use-upcycling``: how long it took, or how it fails."""
    pretrain = (sys.executable, "-m", "megatron_router_upcycling.pretrain", *TINY)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*pretrain, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    dense = run("--save", str(work / "tiny"))
    if dense.returncode:
        return f"not tried: its dense model cannot be trained here ({_last_error(dense.stdout)})"
    upcycling = ("--num-experts", str(COMPARED), "--moe-router-topk", "2", "--moe-use-upcycling")
    start = time.perf_counter()
    moe = run("--load", str(work / "tiny"), "--save", str(work / "tiny-moe"), *upcycling)
    seconds = time.perf_counter() - start
    return f"fails: {_last_error(moe.stdout)}" if moe.returncode else f"{seconds:.1f} s, starting included"


def _last_error(output: str) -> str:
    lines = [line.split("]: ", 1)[-1] for line in output.splitlines() if "Error" in line or "error:" in line]
    return lines[-1] if lines else "no message"


def new_bytes(folder: Path) -> int:
    """Bytes of the files that no other folder shares."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    dense, stats, out = work / "dense", work / "key_stats.safetensors", work / "out"
    print(f"making a dense checkpoint of {options.layers} layers ...", file=sys.stderr)
    aside(make_dense, dense, options.layers, options.hidden, options.ffn, options.vocabulary)
    aside(make_key_stats, stats, options.layers, options.hidden)
    subprocess.run(["sync"], check=True)
    ffn_bytes = 3 * options.layers * options.ffn * options.hidden * 2
    python = (sys.executable, "-m", "megatron_router_upcycling.cli", "convert", dense, out, "--quiet")
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    cpu: dict[str, float] = {}
    added: dict[int, int] = {}

    def take(name: str, *command: Any) -> None:
        seconds, processor, peak = measure_all(*command)
        times.setdefault(name, []).append(seconds)
        cpu[name] = min(cpu.get(name, processor), processor)
        memory[name] = max(memory.get(name, 0.0), peak)

    for _ in range(options.repeats):
        take("import torch", sys.executable, "-c", "import torch")
        take(
            "import torch.distributed.checkpoint", sys.executable, "-c", "import torch.distributed.checkpoint"
        )
        take("cp -r", "cp", "-r", dense, work / "copy")
        take("sync", "sync")
        shutil.rmtree(work / "copy")
        for num_experts in options.experts:
            take(f"convert {num_experts}", *python, "--key-stats", stats, "--num-experts", num_experts)
            added[num_experts] = new_bytes(out)
            shutil.rmtree(out)
    iteration = dense / "iter_0000001"
    plain = (sys.executable, Path(__file__).with_name("plain_upcycle.py"), iteration, work / "copy")
    for name, command in (
        ("plain conversion", (*plain, "--num-experts", COMPARED)),
        (
            "convert --materialize",
            (*python, "--key-stats", stats, "--num-experts", COMPARED, "--materialize"),
        ),
    ):
        take(name, *command)
        shutil.rmtree(work / "copy", ignore_errors=True)
        whole = new_bytes(out) if out.exists() else 0
        shutil.rmtree(out, ignore_errors=True)
        if whole:
            stop_late(out, whole, *command)
            take(f"{name}, killed at 80%, again", *command)
            shutil.rmtree(out)
    best = {name: min(seconds) for name, seconds in times.items()}
    result: dict[str, Any] = {
        "dense_bytes": sum(path.stat().st_size for path in dense.rglob("*") if path.is_file()),
        "seconds": best,
        "processor_seconds": cpu,
        "peak_memory_mb": memory,
        "convert": {},
        "megatron": try_megatron(work) if options.megatron else "not tried",
    }
    for num_experts in options.experts:
        name = f"convert {num_experts}"
        seconds = best[name] - best["import torch"]
        routers = 2 * options.layers * HEADS * HEAD_SIZE * (options.hidden + 1)  # query maps and expert keys
        result["convert"][num_experts] = {
            "seconds_beyond_import_torch": seconds,
            "ratio_to_cp": seconds / best["cp -r"],
            "ratio_to_cp_and_sync": seconds / min(map(sum, zip(times["cp -r"], times["sync"], strict=True))),
            "memory_beyond_import_mb": memory[name] - memory["import torch.distributed.checkpoint"],
            "bytes_added": added[num_experts],
            "bytes_ratio": added[num_experts] / (ffn_bytes + routers),
        }
    return result


def report(result: dict[str, Any]) -> str:
    lines = [f"dense checkpoint: {result['dense_bytes'] / 1e9:.3f} GB"]
    lines += [f"  {name:<38} {seconds:7.2f} s" for name, seconds in result["seconds"].items()]
    for num_experts, row in result["convert"].items():
        lines.append(
            f"{num_experts} experts: {row['seconds_beyond_import_torch']:.2f} s beyond importing torch"
            f" = {row['ratio_to_cp']:.2f} x cp -r (limit {TIME_LIMIT}),"
            f" {row['ratio_to_cp_and_sync']:.2f} x cp -r and sync;"
            f" {row['memory_beyond_import_mb']:+.0f} MB beyond importing torch.distributed.checkpoint"
            f" (limit +{MEMORY_LIMIT_MB:.0f}); {row['bytes_added'] / 1e9:.3f} GB added"
            f" = {row['bytes_ratio']:.4f} x dense FFN and routers (limit {SIZE_LIMIT})"
        )
    ours = result["seconds"][f"convert {COMPARED}"]
    processor = result["processor_seconds"][f"convert {COMPARED}"]
    lines.append(
        f"{COMPARED} experts, beside convert ({ours:.1f} s, importing torch included; {processor:.1f} s of"
        " processor time):"
    )
    again = "convert --materialize, killed at 80%, again"
    for name in ("cp -r", "convert --materialize", again, "plain conversion"):
        seconds, memory = result["seconds"][name], result["peak_memory_mb"][name]
        processor = result["processor_seconds"][name]
        lines.append(
            f"  {name:<43} {seconds:7.1f} s = {seconds / ours:5.1f} x, {processor:6.1f} s of processor time,"
            f" {memory / 1e3:.2f} GB of memory"
        )
    lines.append(f"  Megatron's --moe-use-upcycling              {result['megatron']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--megatron",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try its own upcycling (half a minute)",
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    options.experts = sorted({COMPARED, *options.experts})
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=options.folder) as work:
        result = run(Path(work), options)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
