"""Runs side by side on one page."""

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
example:
  router-upcycle report runs/mixture runs/linear --output report
"""


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one page over training runs: losses, routing, experts",
        description="Draw what training runs wrote beside their checkpoints (run.jsonl and routing.jsonl):"
        " losses, load of the experts by layer and over time, how sure the routers are, how far routers and"
        " experts have moved. Runs may still be training. The page needs neither network nor scripts.",
        epilog=EXAMPLES,
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a folder that pretrain saves to")
    report.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("report"),
        help="for report.html and its pictures; those of an earlier report are replaced (default: report)",
    )
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.diagnostics import report

    runs = report.read_runs(args.runs)
    page = report.write(runs, args.output)
    print(*report.summary_lines(runs), f"saved as {page}", sep="\n")
