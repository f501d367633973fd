"""Compare a training step with the mixture of routers to the same step with Megatron's stock linear router.

    python tools/benchmarks/bench_step.py [--config YAML] [--gpus N] [--rounds R] [--output FILE] [flags]

Runs one rank of an N-GPU run on one device, as ``pretrain --rehearse N`` does: its real shard of the model,
its share of the optimizer, and the configured micro-batch, one a step; flags are Megatron's. Communication
takes no time here, so the figures cover computation and memory only. Both kinds of steps use the same model
and optimizer: only the routers are exchanged between steps, in reversed order in every other round, and the
ratio is the median of the rounds' ratios. (The optimizer's step includes the mixture's parameters in both.)
Tokens and weights are random, and tokens are sent to random experts, so that loads are even. Steps are eager,
as both kinds of routers need, or in CUDA graphs with ``--cuda-graph-impl local --routers mixture``.

The default on a GPU is the paper's run, configs/qwen1.5-0.5b-8x/moe.yaml on 64 GPUs; on the CPU it is a small
model, whose figures say nothing about a GPU.
"""

import resource
import shlex
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import candidates
import measuring
import step_parts
import torch

from megatron_router_upcycling import files
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import figures
from megatron_router_upcycling.planning.rehearsal import run as rehearsal
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.training import launch, train
from megatron_router_upcycling.training.run_log.collector import RoutingCollector

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = ["--config", str(ROOT / "configs/qwen1.5-0.5b-8x/moe.yaml")]
# A small model of the same kind, for the CPU.
ON_CPU = shlex.split(
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 8 --kv-channels 16"
    f" --add-qkv-bias {measuring.QWEN} --vocab-size 4000 --seq-length 256 --max-position-embeddings 256"
    " --micro-batch-size 4 --num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax"
    " --moe-router-dtype fp32 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.02"
    " --moe-z-loss-coeff 0.001 --moe-token-dispatcher-type alltoall --use-distributed-optimizer --lr 1e-4"
    " --train-iters 100 --rehearse-seq-length 256"
)
PACKAGES = ("torch", "megatron-core", "transformer-engine", "megatron-router-upcycling")
WARM_UP = 2  # steps of each kind before the measured ones


def prepare(options: Namespace, flags: list[str]) -> tuple[launch.Run, Setup]:
    on_gpu = torch.cuda.is_available()
    chosen = ["--config", options.config] if options.config else ON_GPU if on_gpu else ON_CPU
    argv = [*chosen, "--gpus", str(options.gpus), "--router", "mixture", *flags]
    run, planned = rehearsal.prepare(launch.parse(argv))
    if run.router is None:
        raise UserError("--num-experts: is not given; a dense model has no router to compare")
    # A router that is swapped out gets no gradient, and Megatron's overlapped reduction would wait for it.
    run.args.overlap_grad_reduce = run.args.overlap_param_gather = False
    return run, planned


def moe_layers(model: list[Any]) -> list[Any]:
    """The MoE layers of this rank, which are the modules with a ``router``."""
    return [module for chunk in model for module in chunk.modules() if hasattr(module, "router")]


def stock_routers(layers: list[Any]) -> list[torch.nn.Module]:
    """Build Megatron's linear router for each layer, with the same configuration."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    made = []
    for layer in layers:
        router = TopKRouter(layer.config, get_default_pg_collection()).to(layer.router.query_weight.device)
        router.set_layer_number(layer.router.layer_number)
        made.append(router)
    return made


def measure(options: Namespace, flags: list[str]) -> dict[str, Any]:
    """For each kind of router: seconds of a step, share of the routers, profile, and peak memory."""
    for name in options.candidates:
        candidates.take(name)
    run, planned = prepare(options, flags)
    args = run.args
    model, optimizer, scheduler = train.build(args, train.model_config(run))
    layers = moe_layers(model)
    RoutingCollector(model, args)  # as in training: a graph holds its sums, a step outside graphs seldom does
    kinds = {"mixture": [layer.router for layer in layers]}
    if "stock" in options.routers:
        kinds["stock"] = stock_routers(layers)
    data = rehearsal.random_batches(args, planned.padded_vocab_size)
    peaks: dict[str, int] = {}

    def seconds(kind: str) -> float:
        for layer, router in zip(layers, kinds[kind], strict=True):
            layer.router = router
            router.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = measuring.now()
        rehearsal.step(model, optimizer, scheduler, data)
        taken = measuring.now() - start
        peaks[kind] = max(peaks.get(kind, 0), peak_bytes())
        return taken

    times = measuring.take_turns(seconds, tuple(kinds), options.rounds, WARM_UP)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    tokens = args.global_batch_size * args.seq_length // args.data_parallel_size
    flops = tokens * figures.flops_per_token(planned) / planned.model_parallel_size
    profiles = {}
    for kind, routers in kinds.items():
        for layer, router in zip(layers, routers, strict=True):
            layer.router = router
        profiles[kind] = step_parts.measure(
            lambda: rehearsal.step(model, optimizer, scheduler, data),
            model,
            labelled=args.cuda_graph_impl == "none",  # a captured layer runs no hooks
        )
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else measuring.processor(),
        "versions": {"cuda": torch.version.cuda} | files.versions(*PACKAGES),
        "model": {"parameters": figures.total_and_active(planned), "gpus": planned.world_size},
        "micro_batch": [args.micro_batch_size, args.seq_length],
        "transformer_impl": args.transformer_impl,
        "grouped_experts": bool(args.moe_grouped_gemm),
        "rounds": options.rounds,
        "step_seconds": medians,
        "throughput_ratio": (
            statistics.median(measuring.ratios(times["stock"], times["mixture"]))
            if "stock" in times
            else None
        ),
        "tokens_per_second": {kind: tokens / value for kind, value in medians.items()},
        "tflops": {kind: flops / value / 1e12 for kind, value in medians.items()},
        "utilisation": {
            kind: flops / value / 1e12 / args.peak_tflops if torch.cuda.is_available() else None
            for kind, value in medians.items()
        },
        "router_share": {
            kind: found["parts"]["routers"] / found["kernel_ms"] if "routers" in found["parts"] else None
            for kind, found in profiles.items()
        },
        "profiles": profiles,
        "peak_bytes": peaks,
    }


def peak_bytes() -> int:
    """Peak memory in bytes: allocated on the GPU in the last step, or of this process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(found: dict[str, Any]) -> str:
    engine = found["transformer_impl"] + (", grouped experts" if found["grouped_experts"] else "")
    total, active = found["model"]["parameters"]
    lines = [
        f"{found['hardware']}; torch {found['versions']['torch']}, {engine}",
        f"one rank of {found['model']['gpus']}: {total / 1e9:.3f} B parameters, {active / 1e9:.3f} B active,"
        f" micro-batch {found['micro_batch'][0]} x {found['micro_batch'][1]}, {found['rounds']} rounds",
        "  router   step ms    tokens/s   TFLOP/s  of peak  routers  peak GiB",
    ]
    for kind, value in found["step_seconds"].items():
        of_peak, routers = found["utilisation"][kind], found["router_share"][kind]
        used = "-" if of_peak is None else f"{of_peak:.1%}"
        share = "-" if routers is None else f"{routers:.2%}"
        rate, flops, peak = (found[name][kind] for name in ("tokens_per_second", "tflops", "peak_bytes"))
        cells = f"{kind:>8}{value * 1e3:10.1f}{rate:12.0f}{flops:10.3f}{used:>9}{share:>9}"
        lines.append(f"{cells}{peak / 2**30:10.2f}")
    for kind, profile in found["profiles"].items():
        lines += [f"{kind}:", step_parts.report(profile)]
    if found["throughput_ratio"] is not None:
        lines.append(f"mixture's throughput over stock's: {found['throughput_ratio']:.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = measuring.Parser(__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", help="the run (default: see above)")
    parser.add_argument("--gpus", type=int, default=64, help="number of GPUs of the whole run (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of steps (default: 10)")
    kinds, which = ("mixture", "stock"), "default: both"
    parser.add_argument("--routers", nargs="+", choices=kinds, default=kinds, help=which)
    names = {"choices": candidates.CANDIDATES, "nargs": "+", "default": []}
    parser.add_argument("--try", dest="candidates", **names, help="other kernels than a run's")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write all figures as JSON")
    options, flags = parser.parse_known_args()
    command = shlex.join(["python", *sys.argv])  # before launch changes sys.argv
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.absolute().parent}")
    found = measure(options, flags) | {"command": command}
    print(report(found))
    measuring.write_json(options.output, found)


if __name__ == "__main__":
    launch.exit_on_user_error(main)
