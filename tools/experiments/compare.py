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
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import Parser, UserError
from tools.experiments import report
from tools.experiments.comparison import Comparison, read
from tools.experiments.foundation import PACKAGE, Foundation, environment, program, torchrun
from tools.experiments.report import RunResult, read_run
from tools.experiments.stages import Pipeline, Stage, command_line


@dataclass(frozen=True)
class Plan:
    """The stages of a comparison: those that come first, and each run's conversion and training by seed."""

    first: tuple[Stage, ...]
    convert: dict[tuple[str, int], Stage]
    train: dict[tuple[str, int], Stage]

    def stages(self) -> list[Stage]:
        """Seed by seed, so that whole comparisons are there as early as can be."""
        runs = sorted(self.train, key=lambda run: [seed for _, seed in self.train].index(run[1]))
        return [*self.first, *(stage for run in runs for stage in (self.convert[run], self.train[run]))]


def plan(comparison: Comparison, output: Path, quick: bool = False) -> Plan:
    """The commands of a comparison in ``output``; runs nothing."""
    flags = _as_flags(comparison.flags)
    first: list[Stage] = []
    keys: dict[str, Stage] = {}
    base = Foundation(output, comparison.dense, quick) if comparison.dense else None
    if base:
        flags = (*base.run_flags, *flags)
        first = [base.corpus, base.dense]

    def dense() -> str:
        return str(base.dense.output if base else comparison.checkpoint)

    def key_stats(config: Path) -> tuple[Path, tuple[Stage, ...]]:
        """The key statistics that a run starts from, and the stages that make them."""
        if base is None:
            if comparison.key_stats is None:
                raise UserError(f"{comparison.path}: 'checkpoint:' needs 'key_stats:' beside it")
            return comparison.key_stats, ()
        source = read_yaml(config)["upcycling"].get("key_source", "pre_rope")
        if source not in keys:
            keys[source] = base.keys(source)
            first.append(keys[source])
        return keys[source].output, (base.dense, keys[source])

    def launch(module: str) -> tuple[str, ...]:
        return (*comparison.launcher, "-m", module) if comparison.launcher else torchrun(module)

    convert, train = {}, {}
    for name, config in comparison.runs.items():
        statistics, made_before = key_stats(config)
        for seed in comparison.seeds:
            run = f"{_file_name(name)}-{seed}"
            converted, trained = output / "converted" / run, output / "trained" / run
            made = convert[name, seed] = Stage(
                f"convert-{run}",
                f"{name}, seed {seed}: convert",
                (
                    *(program("router-upcycle"), "convert", dense(), str(converted)),
                    *("--config", str(config), "--key-stats", str(statistics)),
                    *("--seed", str(seed), "--quiet"),
                ),
                converted,
                (config,),
                made_before,
            )
            train[name, seed] = Stage(
                f"train-{run}",
                f"{name}, seed {seed}: train",
                (
                    *(*launch(PACKAGE + "pretrain"), "--config", str(config), *flags),
                    *("--seed", str(seed), "--load", str(converted), "--save", str(trained)),
                ),
                trained,
                (config,),
                (made,),
                resumes=True,
            )
    return Plan(tuple(first), convert, train)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-")


def _as_flags(entries: dict[str, Any]) -> tuple[str, ...]:
    """Megatron arguments as flags: ``train_iters: 80`` as ``--train-iters 80``."""
    flags: list[str] = []
    for name, value in entries.items():
        if value is False or value is None:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags += map(str, value if isinstance(value, list) else [value])
    return tuple(flags)


def collect(pipeline: Pipeline, plan: Plan) -> list[RunResult]:
    """What every run that has ended found."""
    return [
        read_run(name, seed, stage.output, pipeline.record(stage))
        for (name, seed), stage in plan.train.items()
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
        stages = plan(comparison, args.output, args.quick)
        pipeline = Pipeline(args.output, environment())
        if not args.report_only:
            pipeline.run(stages.stages())
        results = collect(pipeline, stages)
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
