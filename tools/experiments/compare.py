"""Methods or ablations against each other, over several seeds, from one dense model: the paper's comparisons.

    make compare        or: .venv/bin/python -m tools.experiments.compare configs/compare/methods.yaml
    make compare ARGS=configs/compare/ablations.yaml

The file lists runs by name, each the YAML that ``convert`` and ``pretrain`` are both given, seeds, and
claims to look at. A corpus is prepared, a dense model trained and its keys collected, once for all
comparisons in --output; then each run is converted and trained with each seed. A seed decides what is drawn
at random in the conversion and the order of the data, so that with one seed all runs see the same batches in
the same order, and differences between runs are taken seed by seed.

A dense model of your own: ``checkpoint:`` and ``key_stats:`` in the file name what exists already,
``flags:`` has Megatron arguments for every run (data, tokenizer, budget), and ``launcher:`` is what starts a
module on your machines (default: torchrun on two processes here).

What is done is not done again; a comparison that was stopped or killed goes on when the same command is
given again. Ends with OUTPUT/NAME/report.md, results.json and loss_curves.png.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_router_upcycling.errors import Parser, UserError
from tools.experiments import report
from tools.experiments.comparison import read
from tools.experiments.foundation import environment
from tools.experiments.plan import Plan
from tools.experiments.report import RunResult, read_run
from tools.experiments.stages import Pipeline, command_line


def collect(pipeline: Pipeline, plan: Plan) -> list[RunResult]:
    """What every run that has ended found."""
    runs = [(name, seed) for name in plan.comparison.runs for seed in plan.comparison.seeds]
    stages = {run: plan.train(*run) for run in runs}
    return [
        read_run(*run, stage.output, pipeline.record(stage))
        for run, stage in stages.items()
        if pipeline.is_done(stage)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, metavar="FILE", help="such as configs/compare/methods.yaml")
    parser.add_argument("--output", type=Path, default=Path("compare"), help="folder to work in (compare)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps: does it all run?")
    parser.add_argument(
        "--report-only", action="store_true", help="report what has ended so far, run nothing"
    )

    def work() -> str:
        args = parser.parse_args(argv)
        comparison = read(args.comparison)
        plan = Plan(comparison, args.output, args.quick)
        pipeline = Pipeline(args.output, environment())
        if not args.report_only:
            pipeline.run(plan.stages())
        results = collect(pipeline, plan)
        if not results:
            raise UserError(f"--output {args.output}: no run of {args.comparison} has ended there yet")
        folder = args.output / args.comparison.stem
        text = report.write(comparison, results, folder, _again(args))
        where = f"{folder}/report.md, results.json, loss_curves.png; logs in {args.output}/logs"
        return f"{text}\n\nSaved: {where}"

    return command_line(work)


def _again(args: argparse.Namespace) -> str:
    """The command that makes the comparison."""
    words = ["python", "-m", "tools.experiments.compare", str(args.comparison), "--output", str(args.output)]
    return shlex.join(words + ["--quick"] * args.quick)


if __name__ == "__main__":
    sys.exit(main())
