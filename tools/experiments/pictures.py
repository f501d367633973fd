"""The pictures of a comparison: loss curves, and how far the runs are from one of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tools.experiments.comparison import Comparison
from tools.experiments.intervals import interval
from tools.experiments.results import RunResult, differences, training_differences

COLOURS = ("#c8401e", "#2867b2", "#3a9a4b", "#8a4fb0", "#c79a00", "#444444", "#00999c", "#d2679a")
LINES = ("-", "--", ":", "-.")  # of the first so many runs as there are colours, of the next, and so on
FAR = 12.0  # typical differences; what is further off would flatten the picture


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


def curves(comparison: Comparison, results: Sequence[RunResult], path: Path) -> None:
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
        style = LINES[number // len(COLOURS) % len(LINES)]
        runs = [result for result in results if result.name == name and result.seed in shared]
        if not runs:
            continue
        tokens = sorted(set.intersection(*(set(run.training) for run in runs)))
        losses = [[run.training[at] for run in runs] for at in tokens]
        millions = [at / 1e6 for at in tokens]
        left.plot(millions, [mean(c) for c in losses], style, color=colour, label=name, linewidth=1.4)
        left.fill_between(
            millions, [min(c) for c in losses], [max(c) for c in losses], color=colour, alpha=0.12
        )
        ends += [loss for at in losses[len(losses) // 3 :] for loss in at]
    _draw_differences(right, {name: differences(results, name, comparison.reference) for name in names})
    right.set_xlabel(f"held-out loss at the end, nats a token,\nminus that of {comparison.reference}")
    upcycled = sorted(ends)[: max(1, int(0.9 * len(ends)))]
    spread = upcycled[-1] - upcycled[0]
    left.set_ylim(min(ends) - 0.05 * spread, upcycled[-1] + 0.6 * spread)
    left.set_xlabel("million tokens after the conversion")
    left.set_ylabel("training loss (nats a token)")
    left.set_title(f"mean and range over seeds {', '.join(map(str, sorted(shared)))}", fontsize=10)
    left.legend(frameon=False, fontsize=8, ncols=2)
    right.set_title("points: a seed each; bar: mean; line: its 95% interval", fontsize=10)
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
        ends = interval(values)
        if ends.low is not None and ends.high is not None:
            axes.plot([max(ends.low, -edge), min(ends.high, edge)], [number] * 2, color=colour, linewidth=0.9)
        axes.plot([means[name]], [number], "|", color=colour, markersize=18, markeredgewidth=2.5)
    axes.axvline(0.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)


def differences_over_tokens(comparison: Comparison, results: Sequence[RunResult]) -> Any:
    """Training loss minus the reference's over tokens: mean over the seeds that both have, band from the
    lowest to the highest. The scale is that of the runs that are near the reference; others are named."""
    from matplotlib.figure import Figure

    reference = comparison.reference
    found = {
        name: training_differences(results, name, reference) for name in comparison.runs if name != reference
    }
    means = {name: [mean(values) for values in at] for name, (tokens, at) in found.items() if tokens}
    # How far each is off in the later two thirds, where the first jump is over.
    far = {name: max(map(abs, curve[len(curve) // 3 :])) for name, curve in means.items()}
    typical = sorted(far.values())[(len(far) - 1) // 2] if far else 0.0
    near = [name for name in far if far[name] <= FAR * typical] if typical else list(far)
    height = 1.25 * max((far[name] for name in near), default=0.0) or 1.0

    figure = Figure(figsize=(13, 5))
    axes = figure.subplots()
    for number, name in enumerate(comparison.runs):
        if name not in near:
            continue
        tokens, at = found[name]
        millions, colour = [count / 1e6 for count in tokens], COLOURS[number % len(COLOURS)]
        style = LINES[number // len(COLOURS) % len(LINES)]
        axes.plot(millions, means[name], style, color=colour, label=name, linewidth=1.4)
        axes.fill_between(millions, list(map(min, at)), list(map(max, at)), color=colour, alpha=0.12)
    left_out = [f"{name} ({means[name][-1]:+.2f} at the end)" for name in far if name not in near]
    axes.axhline(0.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_ylim(-height, height)
    axes.grid(alpha=0.25)
    axes.set_xlabel("million tokens after the conversion")
    axes.set_ylabel(f"training loss minus that of {reference}\n(nats a token)")
    axes.set_title(
        "mean and range over seeds" + (f"; out of the picture: {', '.join(left_out)}" if left_out else ""),
        fontsize=10,
    )
    if near:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.suptitle(comparison.title)
    figure.tight_layout()
    return figure
