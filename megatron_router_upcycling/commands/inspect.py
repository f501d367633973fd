"""Describe a checkpoint and how its routers would start.

Describe a checkpoint (torch_dist, or dense in the legacy format) and list its tensors. Nothing in it is
executed. For a Mixture-of-Experts also show how similar its experts' keys are and how its routers would
spread tokens, with a warning where routing would start collapsed or over-confident or experts are tied.

examples:
  router-upcycle inspect ckpt/dense
  router-upcycle inspect ckpt/moe --key-stats ckpt/key_stats.safetensors

The routers are tried on hidden states of the dense model, of which collect_keys keeps 512 (--router-samples),
or else on random ones, which they route more evenly. With the key statistics of several texts a table shows
which experts each text goes to.
"""

import argparse
from pathlib import Path

from megatron_router_upcycling.commands.shared import PATHS, add_model_config


def add_flags(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint's root folder")
    inspect.add_argument("--all", action="store_true", help="list optimizer state and extra states as well")
    what = "where the hidden states are, a file a text (default: recorded)"
    inspect.add_argument("--key-stats", metavar="FILE", **PATHS, help=what)
    add_model_config(inspect)


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.diagnostics import checkpoint, routing_start

    routing = routing_start.describe(args.checkpoint, args.key_stats)  # first: what is wrong with --key-stats
    print(checkpoint.describe(args.checkpoint, everything=args.all, config=args.config))
    if routing:
        print(f"\n{routing}")
