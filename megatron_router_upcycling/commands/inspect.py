"""What a checkpoint is, and how its routers would start."""

import argparse
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import add_model_config

EXAMPLES = """\
examples:
  router-upcycle inspect ckpt/dense
  router-upcycle inspect ckpt/moe --key-stats ckpt/key_stats.safetensors

The routers are tried on hidden states of the dense model, of which collect_keys keeps 512 (--router-samples).
Without them random ones stand in, which route more evenly than real ones.
"""


def add(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is, list its tensors, and show how its routers would start",
        description="Say what a checkpoint (torch_dist, or dense in the legacy format) is and list its"
        " tensors. Nothing in it is executed. Of a Mixture-of-Experts: how like its experts' keys are, how"
        " its routers would spread tokens, how far the first step scales the output, and a warning where"
        " routing would start collapsed or experts are tied. Where routers would start very sure of"
        " themselves, the flag of convert that calibrates them.",
        epilog=EXAMPLES,
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint's root folder")
    inspect.add_argument("--all", action="store_true", help="list optimizer state and extra states as well")
    inspect.add_argument(
        "--key-stats",
        metavar="FILE",
        type=Path,
        help="route its samples of hidden states (default: those recorded; without any, random tokens)",
    )
    add_model_config(inspect)
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.diagnostics import checkpoint, routing_start

    routing = routing_start.describe(args.checkpoint, args.key_stats)  # first: what is wrong with --key-stats
    print(checkpoint.describe(args.checkpoint, everything=args.all, config=args.config))
    if routing:
        print(f"\n{routing}")
