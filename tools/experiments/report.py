"""What a comparison found: a table with mean and spread over seeds, loss curves, a sentence for each claim.

Differences between two runs are taken seed by seed: with one seed both saw the same data in the same order.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions
from megatron_router_upcycling.training.run_log import files
from tools.experiments.comparison import Claim, Comparison

ROUTING = ("load_max_over_mean", "dead_experts", "entropy", "weight_sum", "dropped_fraction")
# Columns of the table for some of them: title and format.
COLUMNS = {
    "load_max_over_mean": ("busiest expert", ".2f"),
    "dead_experts": ("dead experts", ".1f"),
    "dropped_fraction": ("dropped", ".1%"),
    "weight_sum": ("weights' sum", ".2f"),
}
COLOURS = ("#c8401e", "#2867b2", "#3a9a4b", "#8a4fb0", "#c79a00", "#444444", "#00999c", "#d2679a")
FAR = 12.0  # typical differences; what is further off would flatten the picture
SURE = 2.0  # standard errors that a mean difference must have, with the same sign in every seed


@dataclass(frozen=True)
class RunResult:
    """One training run. Losses are nats a token; ``training`` is tokens -> loss; ``routing`` is the mean over
    the layers in the last step that was looked at, ``first_routing`` in the first."""

    name: str
    seed: int
    held_out: float
    training: dict[int, float]
    tokens: int
    steps: int
    routing: dict[str, float]
    first_routing: dict[str, float]
    seconds: float
    command: str


def read_run(name: str, seed: int, folder: Path, record: dict[str, Any]) -> RunResult:
    """What the run that saved to ``folder`` left there; ``record`` is its stage's.

    Raises:
        UserError: it has no held-out loss.
    """
    lines = files.read(folder / files.RUN)
    held_out = [line for line in lines if line["kind"] == "held_out" and line["set"] == "validation"]
    if not held_out or held_out[-1]["lm_loss"] is None:
        raise UserError(f"{folder / files.RUN}: no finite held-out loss; let eval_iters be larger than 0")
    routing = files.read(folder / files.ROUTING) or [{}]
    return RunResult(
        name=name,
        seed=seed,
        held_out=held_out[-1]["lm_loss"],
        training={line["tokens"]: line["lm_loss"] for line in lines if line["kind"] == "train"},
        tokens=held_out[-1]["tokens"],
        steps=held_out[-1]["iteration"],
        routing=_layer_means(routing[-1]),
        first_routing=_layer_means(routing[0]),
        seconds=record["seconds"],
        command=record["command"],
    )


def _layer_means(line: dict[str, Any]) -> dict[str, float]:
    return {key: mean(line[key]) for key in ROUTING if line.get(key)}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; of one seed the latter is unknown."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def differences(results: Sequence[RunResult], left: str, right: str) -> list[float]:
    """Held-out loss of ``left`` minus that of ``right``, for the seeds that both have ended."""
    losses = {(result.name, result.seed): result.held_out for result in results}
    seeds = sorted({seed for _, seed in losses})
    return [losses[left, s] - losses[right, s] for s in seeds if (left, s) in losses and (right, s) in losses]


def verdict(claim: Claim, results: Sequence[RunResult]) -> str:
    """An honest sentence: shown, not shown, or contradicted at this scale."""
    found = differences(results, claim.better, claim.than)
    title = f"“{claim.better} is better than {claim.than}” ({claim.source})"
    if len(found) < 2:
        return f"{title}: not judged, which takes two seeds that both have ended."
    spread = Spread.of(found)
    assert spread.deviation is not None
    error = spread.deviation / math.sqrt(spread.count)
    sure = abs(spread.mean) > SURE * error and (all(d < 0 for d in found) or all(d > 0 for d in found))
    word = "not shown" if not sure else "shown" if spread.mean < 0 else "contradicted"
    lower = sum(d < 0 for d in found)
    return (
        f"{title}: **{word} at this scale**; its held-out loss is {abs(spread.mean):.4f} ± {error:.4f}"
        f" {'lower' if spread.mean < 0 else 'higher'} (mean and standard error of {spread.count} paired"
        f" differences), lower with {lower} of {spread.count} seeds."
    )


def table(comparison: Comparison, results: Sequence[RunResult]) -> str:
    """The runs in the file's order, as Markdown."""
    header = ["run", "held-out loss", f"minus {comparison.reference}", "first training loss"]
    header += [title for title, _ in COLUMNS.values()]
    if comparison.paper:
        header.append(f"the paper's average score ({comparison.paper_table})")
    rows = [header]
    for name in comparison.runs:
        runs = [result for result in results if result.name == name]
        if not runs:
            continue
        against = differences(results, name, comparison.reference)
        first = [run.training[min(run.training)] for run in runs if run.training]
        row = [name, str(Spread.of([run.held_out for run in runs]))]
        row.append("" if name == comparison.reference or not against else _signed(Spread.of(against)))
        row.append(f"{mean(first):.4f}" if first else "")
        for key, (_, form) in COLUMNS.items():
            values = [run.routing[key] for run in runs if key in run.routing]
            row.append(f"{mean(values):{form}}" if values else "")
        if comparison.paper:
            row.append(f"{comparison.paper[name]:.2f}" if name in comparison.paper else "")
        rows.append(row)
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the header, that also reads well as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _signed(spread: Spread) -> str:
    return f"{spread.mean:+.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def panels(height: float) -> tuple[Any, Any, Any]:
    """A figure of two panels, the left one wider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), width_ratios=(3, 2))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure, left, right


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def picture(comparison: Comparison, results: Sequence[RunResult], path: Path) -> None:
    """Training loss against tokens in the manner of the paper's figure 3: mean over seeds, band from the
    lowest to the highest; on the right the differences of held-out losses at the end."""
    names = [name for name in comparison.runs if any(result.name == name for result in results)]
    seeds = [{result.seed for result in results if result.name == name} for name in names]
    shared = set.intersection(*seeds) or set.union(*seeds)  # curves of other seeds saw other data
    height = max(4.6, 1.2 + 0.32 * len(names))
    figure, left, right = panels(height)
    ends = []
    for number, name in enumerate(names):
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        runs = [result for result in results if result.name == name and result.seed in shared]
        if not runs:
            continue
        tokens = sorted(set.intersection(*(set(run.training) for run in runs)))
        curves = [[run.training[at] for run in runs] for at in tokens]
        millions = [at / 1e6 for at in tokens]
        left.plot(millions, [mean(c) for c in curves], style, color=colour, label=name, linewidth=1.4)
        left.fill_between(
            millions, [min(c) for c in curves], [max(c) for c in curves], color=colour, alpha=0.12
        )
        ends += [loss for curve in curves[len(curves) // 3 :] for loss in curve]
    _draw_differences(right, {name: differences(results, name, comparison.reference) for name in names})
    right.set_xlabel(f"held-out loss at the end, nats a token,\nminus that of {comparison.reference}")
    upcycled = sorted(ends)[: max(1, int(0.9 * len(ends)))]
    spread = upcycled[-1] - upcycled[0]
    left.set_ylim(min(ends) - 0.05 * spread, upcycled[-1] + 0.6 * spread)
    left.set_xlabel("million tokens after the conversion")
    left.set_ylabel("training loss (nats a token)")
    left.set_title(f"mean and range over seeds {', '.join(map(str, sorted(shared)))}", fontsize=10)
    left.legend(frameon=False, fontsize=8, ncols=2)
    right.set_title("points: pairs of one seed; bar: their mean", fontsize=10)
    figure.suptitle(comparison.title)
    save(figure, path)


def _draw_differences(axes: Any, found: dict[str, list[float]]) -> None:
    """A line a run: its difference with each seed, and their mean; what is far off stands at the edge."""
    means = {name: mean(values) for name, values in found.items() if values}
    typical = sorted(abs(value) for value in means.values())[len(means) // 2] if means else 0.0
    edge = FAR * typical or 1.0
    for number, (name, values) in enumerate(found.items()):
        if not values:
            continue
        colour = COLOURS[number % len(COLOURS)]
        if abs(means[name]) > edge:
            side = math.copysign(1.0, means[name])
            axes.plot([side * edge], [number], ">" if side > 0 else "<", color=colour, markersize=9)
            text = f"{means[name]:+.3f} "
            axes.text(0.93 * side * edge, number, text, ha="right" if side > 0 else "left", va="center")
            continue
        axes.plot(values, [number] * len(values), "o", color=colour, alpha=0.5, markersize=6)
        axes.plot([means[name]], [number], "|", color=colour, markersize=18, markeredgewidth=2.5)
    axes.axvline(0.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)


def write(comparison: Comparison, results: Sequence[RunResult], folder: Path, command: str) -> str:
    """Write report.md, results.json and loss_curves.png to ``folder``; return the table and the sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(comparison, results, folder / "loss_curves.png")
    verdicts = [verdict(claim, results) for claim in comparison.claims]
    tokens = sorted({result.tokens for result in results})
    minutes = sum(result.seconds for result in results) / 60
    after, seeds = (" or ".join(f"{n:,}" for n in tokens), ", ".join(map(str, comparison.seeds)))
    note = (
        f"Held-out loss in nats a token after {after} tokens: mean and standard deviation over"
        f" {len(comparison.seeds)} seeds ({seeds});"
        f" {len(results)} of {len(comparison.runs) * len(comparison.seeds)} runs have ended. Differences are"
        " taken seed by seed. Busiest expert: its tokens over the mean; like dead experts, dropped choices"
        " and the sum of a token's weights it is the mean over layers and seeds, at the end."
        f" A claim counts as shown or contradicted if all seeds agree and the mean difference is more than"
        f" {SURE:.0f} standard errors. Training took {minutes:.0f} minutes in all."
    )
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    sentences = "\n".join(f"- {sentence}" for sentence in verdicts)
    text = "\n\n".join([table(comparison, results), note, sentences]).rstrip()
    (folder / "report.md").write_text(
        f"# {comparison.title}\n\n{text}\n\n![Loss curves](loss_curves.png)\n\n"
        f"Made by `{command}` with {made}.\n",
        encoding="utf-8",
    )
    found = {
        "title": comparison.title,
        "command": command,
        "versions": versions(),
        "runs": [asdict(result) for result in results],
        "verdicts": verdicts,
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return text
