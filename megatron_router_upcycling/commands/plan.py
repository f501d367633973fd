"""Compute what a run needs: parameters, memory, time, communication.

Compute what a run needs on N GPUs, and what is wrong with its layout, without running it.

examples:
  router-upcycle plan moe.yaml --load ckpt/moe --gpus 64
  router-upcycle plan dense.yaml --gpus 64 --num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 8

CONFIG is what pretrain takes as --config. Architecture and router come from a converted checkpoint (--load)
or, without one, from the YAML file and flags. Megatron flags override both. Parameters are exact. Activations
and communication are estimates; pretrain --rehearse compares them with one real rank. The time is scaled from
measurements on one H200, without communication. What cannot work, such as too little memory, is an error;
doubts are warnings.
"""

import argparse
import json
from pathlib import Path

from megatron_router_upcycling.config.flags import add_gpu
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import reading, report


def add_flags(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    plan.usage = "router-upcycle plan [CONFIG] --gpus N [--load CHECKPOINT] [options] [Megatron flags]"
    add("--config", metavar="CONFIG", type=Path, help="as of pretrain; --config may be left out")
    add("--gpus", metavar="N", type=int, required=True, help="all GPUs of the run")
    add("--load", metavar="CHECKPOINT", type=Path, help="the converted checkpoint")
    add_gpu(plan)
    add("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(takes_megatron_flags=True)


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
