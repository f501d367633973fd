"""An upcycled checkpoint proved against the dense one."""

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import add_model_config, progress_bar
from megatron_router_upcycling.errors import UserError

EXAMPLES = """\
example:
  router-upcycle verify ckpt/dense ckpt/moe

Exit status 0 when everything is as it must be, 1 with a table of what differs, 2 after a mistake (one of
the two is no checkpoint, the key statistics are gone). Every byte of every value in MOE is read, the bytes
that it shares with DENSE too: there, a value that changed in both is found by the checksum beside it. Of a
checkpoint that has trained since, structure, checksums and arguments are checked; its values have changed.
"""


def add(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that an upcycled checkpoint is what it must be",
        description="Prove that an upcycled checkpoint is what it must be, by reading it and the dense one.",
        epilog=EXAMPLES,
    )
    verify.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's checkpoint")
    verify.add_argument("moe", metavar="MOE", type=Path, help="what convert made of it, or training since")
    verify.add_argument(
        "--key-stats", metavar="FILE", type=Path, help="what the routers were made from (default: recorded)"
    )
    add_model_config(verify)
    verify.add_argument("--json", metavar="FILE", type=Path, help="write all that was found there as well")
    verify.add_argument("--quiet", action="store_true", help="print what differs only")
    verify.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from megatron_router_upcycling.diagnostics import ties
    from megatron_router_upcycling.verify import proof

    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: a folder, or in none; name a file to write")
    torch.set_num_threads(1)
    start = time.monotonic()
    ready = proof.prepare(args.dense, args.moe, args.key_stats, args.config)
    with progress_bar("verify", ready.bytes_to_read, args.quiet) as advance:
        findings = proof.run(ready, advance)
    if args.json:
        try:
            args.json.write_text(findings.to_json(dense=str(args.dense), moe=str(args.moe)) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written ({error.strerror})") from None
    if findings or not args.quiet:
        print(proof.describe(ready, time.monotonic() - start))
    if not findings and (warning := ties.warn(args.moe)):
        print(warning)
    return 1 if findings else 0
