"""What a run needs on so many GPUs, on paper."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.flags import positive
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import reading, report

EXAMPLES = """\
examples:
  router-upcycle plan moe.yaml --load ckpt/moe --gpus 64
  router-upcycle plan dense.yaml --gpus 64 --num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 8

CONFIG is what pretrain takes as --config. A converted checkpoint brings the architecture and the router with
it (--load); without one, the YAML file and flags must hold them. Any Megatron flag stands above both.
Parameters are exact; activations and communication are estimates, which pretrain --rehearse holds against
one real rank; time is what one rank of an H200 took, scaled, without communication. What cannot work, too
little memory among it, is one line and exit status 2; doubts are warnings.
"""


def add(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a run needs: parameters, memory, time, communication",
        usage="router-upcycle plan [CONFIG] --gpus N [--load CHECKPOINT] [options] [Megatron flags]",
        description="Say on paper what a run needs on N GPUs and what is wrong with its layout.",
        epilog=EXAMPLES,
    )
    plan.add_argument(
        "--config",
        metavar="CONFIG",
        type=Path,
        help="a YAML file as pretrain takes it; it may also stand without --config, before Megatron's flags",
    )
    plan.add_argument("--gpus", metavar="N", type=int, required=True, help="all GPUs of the run")
    plan.add_argument(
        "--load",
        metavar="CHECKPOINT",
        type=Path,
        help="the converted checkpoint: its architecture and router",
    )
    plan.add_argument(
        "--gpu-memory-gib", metavar="GIB", type=positive, default=80, help="of one GPU (default: 80)"
    )
    plan.add_argument(
        "--peak-tflops",
        metavar="TFLOPS",
        type=positive,
        default=989,
        help="of one GPU, dense, in the training dtype (default: 989, an H100's in bfloat16)",
    )
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=run, takes_megatron_flags=True)


def run(args: argparse.Namespace) -> None:
    flags, config = args.megatron_flags, args.config
    if config is None and flags and not flags[0].startswith("-"):
        config = Path(flags.pop(0))
    setup = reading.read(config, args.load, flags, args.gpus)
    if problem := report.too_large(setup, args.gpu_memory_gib):
        raise UserError(problem)
    if args.json:
        print(json.dumps(report.as_json(setup, args.gpu_memory_gib, args.peak_tflops), indent=2))
    else:
        print(report.describe(setup, args.gpu_memory_gib, args.peak_tflops))
