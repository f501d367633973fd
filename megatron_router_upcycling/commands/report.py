"""Compare training runs on one page.

Draw what training runs wrote beside their checkpoints (run.jsonl and routing.jsonl): losses, each expert's
load by layer and over time, how confident the routers are, how far routers and experts have moved. Runs may
still be training. The page needs neither network nor scripts.

example:
  router-upcycle report runs/mixture runs/linear --output report
"""

import argparse
from pathlib import Path


def add_flags(report: argparse.ArgumentParser) -> None:
    add = report.add_argument
    add("runs", metavar="RUN", type=Path, nargs="+", help="a folder that pretrain saves to")
    add("--output", metavar="DIR", type=Path, default=Path("report"), help="replaces an earlier report there")


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.diagnostics import report

    runs = report.read_runs(args.runs)
    page = report.write(runs, args.output)
    print(*report.summary_lines(runs), f"saved as {page}", sep="\n")
