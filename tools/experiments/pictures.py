"""The plots of a comparison: loss curves, and differences between the runs and the reference."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from tools.experiments.comparison import Comparison
from tools.experiments.results import RunResult, differences, interval, training_differences

COLOURS = (
    *("#c8401e", "#2867b2", "#3a9a4b", "#8a4fb0", "#c79a00", "#444444"),
    *("#00999c", "#d2679a", "#8c5a2b", "#5b6ee1", "#7f9a2b", "#e58a1f"),
)
GREY, OTHER = "#bbbbbb", "#777777"  # curves and names of runs without a colour
type Curve = tuple[list[int], list[list[float]]]  # numbers of tokens, and for each the losses, one a seed
FAR = 12.0  # in typical differences; runs further off would flatten the plot and are only marked


def panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels, of which the first is the widest."""
    figure = Figure(figsize=(13, height), layout="tight")
    axes = figure.subplots(1, count, width_ratios=(3, 2)[:count], squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.25)
    return figure, list(axes)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def curves(comparison: Comparison, results: Sequence[RunResult]) -> Figure:
    """Left: training loss over tokens, like the paper's figure 3. Right: differences of the held-out losses
    at the end, which is the only panel if there are no training losses."""
    names = [name for name in comparison.runs if any(result.name == name for result in results)]
    seeds = [{result.seed for result in results if result.name == name} for name in names]
    shared = set.intersection(*seeds) or set.union(*seeds)  # curves of other seeds saw other data
    found: dict[str, Curve] = {}
    for name in names:
        runs = [result for result in results if result.name == name and result.seed in shared]
        tokens = sorted(set.intersection(*(set(run.training) for run in runs))) if runs else []
        if tokens:
            found[name] = tokens, [[run.training[at] for run in runs] for at in tokens]
    figure, (*left, right) = panels(1 + bool(found), max(4.6, 1.4 + 0.27 * len(names)))
    colours: dict[str, str] = {}
    for axes in left:
        late = [at for _, losses in found.values() for at in losses[len(losses) // 3 :]]
        later = sorted(loss for at in late for loss in at)
        upcycled = later[: max(1, int(0.9 * len(later)))]
        spread = upcycled[-1] - upcycled[0] or 1.0
        axes.set_ylim(upcycled[0] - 0.05 * spread, upcycled[-1] + 0.3 * spread)
        colours = draw_curves(axes, found, comparison.reference, bands=False)
        axes.set_ylabel("training loss (nats a token)")
        axes.set_title(f"mean over seeds {', '.join(map(str, sorted(shared)))}", fontsize=10)
    ends = {name: differences(results, name, comparison.reference) for name in names}
    _draw_differences(right, ends, colours)
    right.set_xlabel(f"held-out loss at the end, nats a token,\nminus that of {comparison.reference}")
    right.set_title("points: a seed each; bar: mean;\nline: its 95% interval", fontsize=10)
    figure.suptitle(comparison.title)
    return figure


def draw_curves(axes: Any, found: dict[str, Curve], reference: str, bands: bool) -> dict[str, str]:
    """Draw runs' means over tokens, with bands from the lowest seed to the highest, and names on the right.

    If there are more runs than colours, only the first, the reference and those that end lowest and highest
    are coloured; the others are thin and grey.

    Returns:
        The colours by the names of runs.
    """
    ends = {name: mean(values[-1]) for name, (_, values) in found.items()}
    chosen = list(found)
    if len(chosen) > len(COLOURS):
        by_end = sorted(chosen, key=ends.__getitem__)
        marked = {chosen[0], reference, *by_end[:3], *by_end[-3:]}
        chosen = [name for name in chosen if name in marked]
        corner = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 9, "color": OTHER}
        axes.text(0.99, 0.98, f"grey: {len(found) - len(chosen)} others", **corner)
    colours = dict(zip(chosen, COLOURS, strict=False))
    for name, (tokens, values) in found.items():
        millions, middle = [count / 1e6 for count in tokens], list(map(mean, values))
        colour, width = (colours[name], 1.6) if name in colours else (GREY, 0.7)
        axes.plot(millions, middle, color=colour, linewidth=width, zorder=2 + width, label=name)
        if bands and name in colours:
            lowest, highest = list(map(min, values)), list(map(max, values))
            axes.fill_between(millions, lowest, highest, color=colour, alpha=0.12)
    axes.set_xlabel("million tokens after the conversion")
    axes.margins(x=0.02)

    low, high = axes.get_ylim()
    step = (high - low) * 0.2 / axes.figure.get_figheight()  # a line of text
    places: list[float] = []
    named = sorted(colours, key=ends.__getitem__)
    for name in named:
        places.append(max(min(max(ends[name], low), high), places[-1] + step if places else low))
    for number in reversed(range(len(places))):  # move names down that would be above the top
        places[number] = min(places[number], high - step * (len(places) - 1 - number))
    for name, place in zip(named, places, strict=True):
        where = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
        axes.text(1.01, place, name, color=colours[name], **where)
    return colours


def _draw_differences(axes: Any, found: dict[str, list[float]], colours: dict[str, str]) -> None:
    """For each run a row with its difference for each seed and their mean; outliers are at the edge."""
    means = {name: mean(values) for name, values in found.items() if values}
    typical = sorted(abs(value) for value in means.values())[len(means) // 2] if means else 0.0
    edge = FAR * typical or 1.0
    for number, (name, values) in enumerate(found.items()):
        if not values:
            continue
        colour, middle = colours.get(name, OTHER), means[name]
        if abs(middle) > edge:
            side = math.copysign(1.0, middle)
            axes.plot([side * edge], [number], ">" if side > 0 else "<", color=colour, markersize=9)
            align = "right" if side > 0 else "left"
            axes.text(0.93 * side * edge, number, f"{middle:+.3f} ", ha=align, va="center")
            continue
        axes.plot(values, [number] * len(values), "o", color=colour, alpha=0.5, markersize=6)
        if ends := interval(values).ends:
            axes.plot([max(ends[0], -edge), min(ends[1], edge)], [number] * 2, color=colour, linewidth=0.9)
        axes.plot([middle], [number], "|", color=colour, markersize=18, markeredgewidth=2.5)
    axes.axvline(0.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)


def differences_over_tokens(comparison: Comparison, results: Sequence[RunResult]) -> Figure:
    """Training loss minus the reference's over tokens, for the seeds that both have. The scale fits the runs
    that are near the reference; the title names the others."""
    reference = comparison.reference
    others = (name for name in comparison.runs if name != reference)
    found = {name: training_differences(results, name, reference) for name in others}
    found = {name: curve for name, curve in found.items() if curve[0]}
    means = {name: list(map(mean, values)) for name, (_, values) in found.items()}
    # The largest difference of each in the last two thirds, after the initial jump.
    far = {name: max(map(abs, curve[len(curve) // 3 :])) for name, curve in means.items()}
    typical = sorted(far.values())[(len(far) - 1) // 2] if far else 0.0
    near = {name: found[name] for name in far if far[name] <= FAR * typical or not typical}
    height = 1.25 * max((far[name] for name in near), default=0.0) or 1.0

    figure, (axes,) = panels(1, 5.0)
    axes.set_ylim(-height, height)
    draw_curves(axes, near, reference, bands=True)
    axes.axhline(0.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"training loss minus that of {reference}\n(nats a token)")
    left_out = [f"{name} ({means[name][-1]:+.2f} at the end)" for name in far if name not in near]
    beyond = f"; out of the picture: {', '.join(left_out)}" if left_out else ""
    axes.set_title(f"mean and range over seeds{beyond}", fontsize=10)
    figure.suptitle(comparison.title)
    return figure
