"""Prove that an upcycled checkpoint is right.

Read an upcycled checkpoint and the dense one that it was made of, and compare every value, bit for bit, with
what convert makes of the dense one.

example:
  router-upcycle verify ckpt/dense ckpt/moe

The exit status is 0 when nothing differs, 1 with a table of what differs, and 2 after a mistake (one of the
two is no checkpoint, the key statistics are gone). The bytes that MOE shares with DENSE are read too: a
value that changed in both is found by its checksum. Of a checkpoint that was trained since, only the
structure, checksums and arguments are checked.
"""

import argparse
import time
from pathlib import Path

from megatron_router_upcycling.commands.shared import PATHS, add_model_config, progress_bar
from megatron_router_upcycling.errors import UserError, os_error_as


def add_flags(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's checkpoint")
    verify.add_argument("moe", metavar="MOE", type=Path, help="what convert made of it, trained or not")
    what = "key statistics of the routers (default: recorded)"
    verify.add_argument("--key-stats", metavar="FILE", **PATHS, help=what)
    add_model_config(verify)
    verify.add_argument("--json", metavar="FILE", type=Path, help="write everything that was found there")
    verify.add_argument("--quiet", action="store_true", help="print only what differs")


def run(args: argparse.Namespace) -> int:
    import torch

    from megatron_router_upcycling.diagnostics import routing_start
    from megatron_router_upcycling.verify import proof

    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: a folder, or in none; name a file to write")
    torch.set_num_threads(1)
    start = time.monotonic()
    ready = proof.prepare(args.dense, args.moe, args.key_stats, args.config)
    with progress_bar("verify", ready.bytes_to_read, args.quiet) as advance:
        findings = proof.run(ready, advance)
    if args.json:
        with os_error_as(f"--json {args.json}: cannot be written"):
            args.json.write_text(findings.to_json(dense=str(args.dense), moe=str(args.moe)) + "\n", "utf-8")
    if findings or not args.quiet:
        print(proof.describe(ready, time.monotonic() - start))
    if not findings and (warning := routing_start.warn_of_ties(args.moe)):
        print(warning)
    return 1 if findings else 0
