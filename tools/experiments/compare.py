"""Compare methods or ablations over several seeds, starting from one dense model, as the paper does.

    make compare        or: .venv/bin/python -m tools.experiments.compare configs/compare/methods.yaml
    make compare ARGS=configs/compare/ablations.yaml

The file lists runs by name, seeds, and claims to check. A run is the YAML configuration that both ``convert``
and ``pretrain`` get (a file, or its entries). Once for all comparisons in --output, a corpus is prepared, a
dense model is trained and its keys are collected; then each run is converted and trained with each seed. The
seed decides the random values of the conversion and the order of the data: with one seed, all runs see the
same batches in the same order, so differences between runs are taken seed by seed.

A run's ``convert:`` lets it begin elsewhere: from branches of the dense model that were trained on parts of
the text (configs/compare/domains.yaml), or from the trained model of an earlier run, which gets more experts
(configs/compare/more_experts.yaml).

To use your own dense model, name an existing ``checkpoint:`` and ``key_stats:`` in the file. ``flags:`` holds
Megatron arguments for every run (data, tokenizer, budget), and ``launcher:`` is the command that starts a
module on your machines (default: torchrun with two processes on this machine).

--jobs N runs N jobs in parallel, each with its own log and, on a terminal, a progress line. They share one
GPU, or are distributed over several; on the CPU each process uses one core (or OMP_NUM_THREADS), so choose N
so that N times ``ranks:`` (default: 2) is the number of cores. N does not change results. A failed run does
not stop the others: the report names it, and the exit status is 1.

Write claims into the file before its runs begin: OUTPUT/NAME/claims.json records when each was first seen,
and the report marks claims of which a run had begun by then.

Finished stages are skipped: run the same command again to resume a comparison that was stopped or killed.
At the end it writes OUTPUT/NAME/report.md, results.json, loss_curves.png and differences.png.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_router_upcycling.errors import Parser, UserError
from megatron_router_upcycling.training.run_log import files
from tools.experiments import claims, report
from tools.experiments.comparison import Comparison, read
from tools.experiments.foundation import environment, shares
from tools.experiments.plan import Plan
from tools.experiments.results import RunResult, held_out, read_run
from tools.experiments.stages import Pipeline, command_line


def collect(pipeline: Pipeline, plan: Plan) -> tuple[list[RunResult], dict[tuple[str, int], str]]:
    """The results of all finished runs, and the reasons why others failed."""
    results, failures = [], {}
    for run in plan.runs():
        stage = plan.train(*run)
        if found := [(part, why) for part in plan.stages_of([run]) if (why := pipeline.failure(part))]:
            part, why = found[0]
            failures[run] = f"{part.name}: {why}"
        if pipeline.is_done(stage):
            asked = plan.ask(*run) if plan.comparison.tasks else None
            answers = asked.output if asked and pipeline.is_done(asked) else None
            try:
                results.append(read_run(*run, stage.output, pipeline.record(stage), answers))
            except UserError as error:  # it diverged
                failures[run] = str(error)
    return results, failures


def choose_runs(text: str | None, comparison: Comparison) -> list[str]:
    """The runs that ``--runs`` names; all runs without it. Names may contain commas."""
    if text is None:
        return list(comparison.runs)
    chosen, rest = [], text.strip()
    while rest:
        fitting = [name for name in comparison.runs if f"{rest},".startswith(f"{name},")]
        if not fitting:
            raise UserError(f"--runs {rest}: begins with none of the runs ({'; '.join(comparison.runs)})")
        chosen.append(max(fitting, key=len))
        rest = rest.removeprefix(chosen[-1]).removeprefix(",").strip()
    return chosen


def choose_seeds(text: str | None, comparison: Comparison) -> list[int]:
    """The seeds that ``--seeds`` names; all seeds without it."""
    if text is None:
        return list(comparison.seeds)
    words, known = [word.strip() for word in text.split(",")], {str(seed): seed for seed in comparison.seeds}
    if not set(words) <= known.keys():
        raise UserError(f"--seeds {text}: name some of the file's, {','.join(known)}")
    return [known[word] for word in words]


def work(argv: list[str] | None) -> tuple[str, int]:
    args = _parser().parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 or more")
    comparison = read(args.comparison, args.output, args.quick)
    output, plan = comparison.output, Plan(comparison, args.quick)
    names, seeds = choose_runs(args.runs, comparison), choose_seeds(args.seeds, comparison)
    chosen = [(name, seed) for name, seed in plan.runs() if name in names and seed in seeds]
    pipeline = Pipeline(output, environment())
    seen = claims.see(comparison)
    if not args.report_only:
        pipeline.run(plan.stages_of(chosen), shares(args.jobs, plan.ranks), keep_going=True)
    results, failed = collect(pipeline, plan)
    failures = [f"{name}, seed {seed}: {why}" for (name, seed), why in failed.items()]
    if not results:
        why = failures[0] if failures else f"no run of {args.comparison} has ended there yet"
        raise UserError(f"--output {output}: {why}")
    end = held_out(files.read(plan.foundation.dense.output / files.RUN)) if plan.foundation else None
    dense = end["lm_loss"] if end else None
    folder = output / comparison.path.stem
    text = report.write(comparison, results, folder, _again(args), seen, failures, dense)
    text += f"\n\nSaved: {folder}/report.md, results.json and two pictures; logs in {output}/logs"
    if not args.report_only and not failed.keys().isdisjoint(chosen):
        return f"{text}\nRun the same command again to retry the failed runs.", 1
    return text, 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("comparison", type=Path, metavar="FILE", help="such as configs/compare/methods.yaml")
    folder = "working folder (default: the file's output:, or compare; with --quick, its subfolder quick)"
    add("--output", type=Path, help=folder)
    add("--quick", action="store_true", help="a tiny model and a few steps: does it all run?")
    add("--jobs", metavar="N", type=int, default=1, help="number of parallel runs (default: 1)")
    add("--runs", metavar="A,B", help="these runs only (default: all)")
    add("--seeds", metavar="1,2", help="these of the file's seeds only (default: all)")
    add("--report-only", action="store_true", help="report what has ended so far, run nothing")
    return parser


def _again(args: argparse.Namespace) -> str:
    """The command that repeats the comparison."""
    words = ["python", "-m", "tools.experiments.compare", str(args.comparison)]
    words += ["--output", str(args.output)] if args.output else []
    return shlex.join(words + ["--quick"] * args.quick)


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
