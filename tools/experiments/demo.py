"""Train a small dense model on text and upcycle it to Mixtures-of-Experts, on any machine, in a few minutes.

    make demo        or: .venv/bin/python -m tools.experiments.demo [--output DIR] [--quick]

Prepares a corpus, trains a small dense model on two processes, collects its key statistics, converts it by
Router Upcycling and by vanilla upcycling (a random linear router), trains both with two-way expert
parallelism on the same data in the same order, and compares them on held-out text. This is the comparison
(``tools.experiments.compare``) configs/compare/demo.yaml with one seed. The first model is then exported to
Hugging Face format and loaded by transformers; its loss is compared with Megatron's, and it generates text.

Every step is a command that is printed before it runs, with its output in DIR/logs. Finished steps are
skipped: run the same command again to resume. Writes DIR/report.md, results.json and loss_curves.png.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_router_upcycling.data import record
from megatron_router_upcycling.errors import Parser
from tools.experiments import pictures, report
from tools.experiments.comparison import read
from tools.experiments.foundation import Foundation, environment, flags, program
from tools.experiments.plan import Plan, export_command
from tools.experiments.results import RunResult, read_run
from tools.experiments.stages import Pipeline, Stage, command_line, in_order

COMPARISON = Path("configs/compare/demo.yaml")

# Colour and width of a run's line. Curves may coincide, so thinner ones are drawn on top.
STYLES = (("#444444", 2.0), ("#c8401e", 1.2), ("#2867b2", 3.0))
LEGEND = (
    "Loss: nats a token on the same held-out samples. Load: tokens of the busiest expert over the mean, in"
    " the first and the last training step, averaged over layers (1 is even). Conversion: wall time of the"
    " whole command. Bytes added: to the disk, of the size of the checkpoint's files."
)


class Demonstration(Plan):
    """A comparison that also evaluates every run before its training, and exports the reference."""

    @property
    def base(self) -> Foundation:
        assert self.foundation, f"{self.comparison.path} names no dense model to train"
        return self.foundation

    def stages(self) -> list[Stage]:
        runs = [stage for run in self.runs() for stage in (self.evaluate(*run), self.train(*run))]
        return in_order([*runs, self.check()])

    def exported(self) -> Stage:
        """The training run of the model that is exported."""
        return self.train(self.comparison.reference, self.comparison.seeds[0])

    def export_one(self) -> Stage:
        trained, folder = self.exported(), self.output / "hf"
        command = export_command(trained, folder)
        return Stage("export", "export to Hugging Face format", command, folder, after=(trained,))

    def check(self) -> Stage:
        exported, trained, found = self.export_one(), self.exported(), self.output / "check.json"
        tool = (program("python"), "-m", "tools.experiments.check_export", str(exported.output))
        config = flags(config=trained.files[0])
        return Stage(
            "check",
            "load it with transformers, compare with Megatron, write a few lines",
            (*tool, *config, *self.base.run_flags("check"), *flags(load=trained.output, output=found)),
            found,
            trained.files,
            (exported, trained),
        )


@dataclass(frozen=True)
class Model:
    """One row of the table and one curve of the plot; None for columns that do not apply to the dense model.
    Losses are held-out losses in nats a token; loads are those of the busiest expert over the mean."""

    name: str
    run: RunResult
    loss_at_start: float | None = None  # before any further training
    load_at_start: float | None = None
    load_at_end: float | None = None
    conversion_seconds: float | None = None
    bytes_added: int | None = None  # by the conversion, to the disk
    bytes_named: int | None = None  # size of the converted checkpoint, shared bytes included

    @property
    def training(self) -> dict[int, float]:
        """Training losses by step; all steps have the same number of tokens."""
        run = self.run
        return {tokens * run.steps // run.tokens: loss for tokens, loss in run.training.items()}


def collect(pipeline: Pipeline, plan: Demonstration) -> list[Model]:
    """The results of the finished stages: the dense model, then the models made from it."""

    def result(name: str, seed: int, stage: Stage) -> RunResult:
        return read_run(name, seed, stage.output, pipeline.record(stage))

    dense = plan.base.dense
    models = [Model("dense", result("dense", plan.comparison.seeds[0], dense))]
    for name, seed in plan.runs():
        converted, run = plan.convert(name, seed), result(name, seed, plan.train(name, seed))
        at_start = result(name, seed, plan.evaluate(name, seed)).held_out
        first, last = (routing["load_max_over_mean"] for routing in (run.first_routing, run.routing))
        seconds, size = pipeline.record(converted)["seconds"], disk_use(converted.output, dense.output)
        models.append(Model(name, run, at_start, first, last, seconds, *size))
    return models


def disk_use(root: Path, source: Path) -> tuple[int, int]:
    """Bytes that checkpoint ``root`` adds to those of ``source``, and the bytes of all its files.

    A file that is hard-linked to a file of ``source`` adds nothing.
    """
    held = {(s.st_dev, s.st_ino) for s in (path.stat() for path in source.rglob("*") if path.is_file())}
    stats = [path.stat() for path in root.rglob("*") if path.is_file()]
    added = sum(s.st_size for s in stats if (s.st_dev, s.st_ino) not in held)
    return added, sum(s.st_size for s in stats)


def table(models: list[Model]) -> str:
    """The results as a Markdown table; LEGEND explains the columns."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "–" if value is None else f"{value:{form}}{unit}"

    header = ["model", "loss at step 0", "at the end", "load at step 0", "at the end"]
    rows = [[*header, "conversion", "bytes added"]]
    for model in models:
        row = [model.name, number(model.loss_at_start, ".4f"), number(model.run.held_out, ".4f")]
        row += [number(model.load_at_start, ".2f"), number(model.load_at_end, ".2f")]
        row.append(number(model.conversion_seconds, ".1f", " s"))
        added = None if model.bytes_added is None else model.bytes_added / 1e6
        rows.append([*row, number(added, ".2f", f" of {(model.bytes_named or 0) / 1e6:.2f} MB")])
    return report.markdown(rows)


def picture(models: list[Model]) -> Figure:
    """The loss curves over one axis of steps: the dense model's first, and the others' from its end on."""
    converted_at, last = models[0].run.steps, max(model.run.steps for model in models[1:])
    figure, (left, right) = pictures.panels(2, 4.6)
    shown: list[float] = []  # on the right: losses from the conversion on
    for model, (colour, width) in zip(models, STYLES, strict=True):
        start = 0 if model is models[0] else converted_at
        curve = {start + step: loss for step, loss in model.training.items()}
        points = {} if model.loss_at_start is None else {start: model.loss_at_start}
        points[start + model.run.steps] = model.run.held_out
        style: dict[str, Any] = {"color": colour, "zorder": 5 - width}
        dots: dict[str, Any] = {"markersize": 5 + 2 * width, "markeredgecolor": "white", **style}
        for axes in (left, right):
            axes.plot(list(curve), list(curve.values()), linewidth=width, label=model.name, **style)
            axes.plot(list(points), list(points.values()), "o", **dots)
        shown += [*points.values(), *(curve.values() if start else ())]
    for axes in (left, right):
        axes.axvline(converted_at, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("training step")
    left.set_ylabel("loss (nats a token)")
    left.set_title("line: training loss; points: held-out loss", fontsize=10)
    left.legend(frameon=False)
    margin = 0.1 * (max(shown) - min(shown))
    right.set_xlim(converted_at * 0.9, (converted_at + last) * 1.02)
    right.set_ylim(min(shown) - margin, max(shown) + margin)
    right.set_title("from the conversion on", fontsize=10)
    return figure


def as_json(models: list[Model]) -> dict[str, Any]:
    """Everything that was measured, for other programs."""
    found: dict[str, Any] = {"models": [], "curves": {}}
    for model in models:
        row = asdict(model) | {"loss_at_end": model.run.held_out}
        del row["run"]
        found["models"].append(row)
        curve = {"training": model.training, "held_out": model.run.held_out, "last": model.run.steps}
        found["curves"][model.name] = curve
    return found


def describe(models: list[Model], check: dict[str, Any], vocabulary: int) -> str:
    """The table, its legend, and the results of ``check_export``, in Markdown."""
    dense, exported, *_ = models
    samples = "\n".join(f"- {said['prompt']!r} → {said['continuation']!r}" for said in check["samples"])
    return f"""{table(models)}

{LEGEND}
A guess at random would have a loss of {math.log(vocabulary):.4f}. The dense model was trained for
{dense.run.steps} steps, each Mixture-of-Experts for {exported.run.steps} more on the same data in the same
order.

Exported to Hugging Face format, {exported.name}'s held-out loss is {check["transformers"]:.6f} in
transformers and {check["megatron"]:.6f} in Megatron. It continues held-out text:

{samples}"""


def write(pipeline: Pipeline, plan: Demonstration) -> str:
    """Write report.md, results.json and loss_curves.png; return the text of the report."""
    models, output = collect(pipeline, plan), plan.output
    corpus = record.read(plan.base.data)
    assert corpus, "the corpus was prepared by the first stage"
    check = json.loads(plan.check().output.read_text(encoding="utf-8"))
    text = describe(models, check, corpus.vocab_size)
    pictures.save(picture(models), output / "loss_curves.png")
    page = f"# Demonstration\n\n{text}\n\n![Loss curves](loss_curves.png)\n"
    (output / "report.md").write_text(page, encoding="utf-8")
    measured = as_json(models) | {"exported": check}
    (output / "results.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train, upcycle and compare a small model, start to end.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to work in (demo)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps: does it all run?")

    def work() -> tuple[str, int]:
        args = parser.parse_args(argv)
        plan = Demonstration(read(COMPARISON, args.output), args.quick)
        pipeline = Pipeline(args.output, environment())
        pipeline.run(plan.stages())
        text = write(pipeline, plan)
        where = f"{args.output}/report.md, results.json, loss_curves.png; logs in {args.output}/logs"
        return f"{text}\n\nSaved: {where}", 0

    return command_line(work)


if __name__ == "__main__":
    sys.exit(main())
