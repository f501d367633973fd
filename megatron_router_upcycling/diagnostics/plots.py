"""The plots of a report, one function each, drawn from the lines of a run's log files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = ("#c8401e", "#2867b2", "#3a9a4b", "#8a4fb0", "#c79a00", "#444444", "#00999c", "#d2679a")
GREY, STYLE = "#8a8a8a", "seaborn-v0_8-whitegrid"
EVEN_RANGE = 2  # load maps show shares from 1/4 to 4 times the even one, in powers of two
MOST_LABELS = 16  # layer labels at a load map
COLUMNS, MOST_NAMES = 3, 4  # columns of small multiples, and names in a row of a legend
SETS = (None, "validation")  # the sets whose losses are drawn; training lines name no set


@dataclass(frozen=True)
class RunData:
    """A run's data: its name in the report, the lines of its two log files, and its manifest."""

    name: str
    losses: list[dict[str, Any]]
    routing: list[dict[str, Any]]  # the rare measures are merged into each line
    manifest: dict[str, Any] = field(default_factory=dict)
    texts: tuple[list[str], list[list[float]]] | None = None  # as ``routing_start.texts`` gives them

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of run.jsonl with a loss, ``train`` or ``held_out``, the last of each iteration."""
        wanted = [line for line in self.losses if line.get("kind") == kind and line.get("set") in SETS]
        found = {line["iteration"]: line for line in wanted if line.get("lm_loss") is not None}
        return [found[iteration] for iteration in sorted(found)]


def draw_all(runs: Sequence[RunData], folder: Path) -> dict[str, list[Path]]:
    """Draw all plots that the runs have data for. Returns section of the report -> its PNGs in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    routed = [(i, run) for i, run in enumerate(runs) if run.routing]
    pictures: dict[str, Callable[[], Any]] = {"loss": partial(_loss, runs)}
    if routed:
        pictures |= {"load": partial(_grid, routed, LOAD), "routing": partial(_grid, routed, ROUTING)}
        pictures |= {f"load_map_{index + 1}": partial(_load_map, run) for index, run in routed}
    if any(_series(run, name) for _, run in routed for name in SPECIALISATION):
        pictures["specialisation"] = partial(_grid, routed, SPECIALISATION)
    pictures |= {f"texts_{i + 1}": partial(_texts, run) for i, run in enumerate(runs) if run.texts}
    drawn: dict[str, list[Path]] = {}
    with pyplot.style.context(STYLE):
        for key, draw in pictures.items():
            figure = draw()
            for axes in figure.axes:
                if axes.get_xlabel() == "tokens":
                    axes.xaxis.set_major_formatter(ticker.EngFormatter())
            path = folder / f"{key}.png"
            figure.savefig(path, metadata={"Software": None})
            drawn.setdefault(key.rstrip("_0123456789"), []).append(path)
            pyplot.close(figure)
    return drawn


def colour(index: int) -> str:
    """The colour of the run at ``index``, in plots and in the table."""
    return COLOURS[index % len(COLOURS)]


def _loss(runs: Sequence[RunData]) -> Any:
    """Training loss as lines, held-out loss as points; on the right the last two thirds."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained")
    last = max((line["tokens"] for run in runs for line in run.losses), default=1)
    for axes, start in ((left, 0.0), (right, last / 3)):
        for index, run in enumerate(runs):
            for kind, look in (
                ("train", {"linewidth": 1.7, "label": run.name}),
                ("held_out", {"ls": "", "marker": "o", "ms": 6, "markeredgecolor": "white", "zorder": 5}),
            ):
                lines = [line for line in run.lines(kind) if line["tokens"] >= start]
                x, y = ([line[key] for line in lines] for key in ("tokens", "lm_loss"))
                axes.plot(x, y, color=colour(index), **look)
        axes.set_xlabel("tokens")
    left.set_title("LM loss: line training, points held out")
    left.set_ylabel("nats a token")
    left.legend()
    right.set_title("the last two thirds")
    return figure


# Panels of the small multiples, in drawing order: measure -> (title, function from the number of experts to
# the even or ideal value, which is drawn as a dashed line).
type Ideal = Callable[[int], float] | None
type Panels = dict[str, tuple[str, Ideal]]
LOAD: Panels = {
    "load_cv": ("spread of the load (std / mean)", lambda n: 0.0),
    "load_max_over_mean": ("busiest expert over the mean", lambda n: 1.0),
    "dead_experts": ("dead experts a layer", lambda n: 0.0),
}
ROUTING: Panels = {
    "entropy": ("entropy (dashed: uniform)", math.log),
    "top1_probability": ("largest probability", lambda n: 1 / n),
    "weight_sum": ("sum of the k weights", lambda n: 1.0),
    "load_balancing_loss": ("load balancing loss", lambda n: 1.0),
    "z_loss": ("z-loss", None),
    "dropped_fraction": ("choices dropped", lambda n: 0.0),
}
SPECIALISATION: Panels = {
    "expert_distance": ("distance of two experts", None),
    "router_drift": ("change of the router", None),
    "query_weight_drift": ("change of the query maps", None),
    "expert_key_drift": ("change of the expert keys", None),
    "router_agreement": ("one router agrees with the mixture", lambda n: 1 / n),
    "gate_cosine": ("cosine between routers' gates", lambda n: 0.0),
}


def _grid(routed: Sequence[tuple[int, RunData]], panels: Panels) -> Any:
    """Small multiples over tokens, one for each measure that any run has."""
    from matplotlib import pyplot

    present = {name: panel for name, panel in panels.items() if any(_series(run, name) for _, run in routed)}
    rows = math.ceil(len(present) / COLUMNS)
    look: dict[str, Any] = {"figsize": (11.5, 2.75 * rows + 0.5), "layout": "constrained"}
    figure, grid = pyplot.subplots(rows, COLUMNS, squeeze=False, **look)
    figure.get_layout_engine().set(h_pad=0.11, w_pad=0.08)
    for axes, (name, (title, ideal)) in zip(grid.flat, present.items(), strict=False):
        _panel(axes, routed, name, ideal)
        axes.set(title=title, xlabel="tokens")
    for axes in list(grid.flat)[len(present) :]:
        axes.axis("off")
    handles = [axes.get_legend_handles_labels() for axes in grid.flat]
    names = {name: line for lines, labels in handles for line, name in zip(lines, labels, strict=True)}
    figure.legend(names.values(), names, loc="outside lower center", ncols=MOST_NAMES, fontsize=8.5)
    return figure


def _panel(axes: Any, routed: Sequence[tuple[int, RunData]], name: str, ideal: Ideal) -> None:
    """One measure over tokens: the mean over layers as a line, lowest to highest layer as a band."""
    for index, run in routed:
        series = _series(run, name)
        if not series:
            continue
        x = [tokens for tokens, _ in series]
        marker = "o" if len(series) < 12 else ""
        middle = [mean(values) for _, values in series]
        axes.plot(x, middle, color=colour(index), linewidth=1.7, label=run.name, marker=marker, ms=3.5)
        low, high = ([pick(values) for _, values in series] for pick in (min, max))
        axes.fill_between(x, low, high, color=colour(index), alpha=0.13, linewidth=0)
    if ideal:
        for n in {len(run.routing[-1]["load"][0]) for _, run in routed}:
            axes.axhline(ideal(n), color=GREY, linewidth=1, linestyle="--", zorder=1)


def _series(run: RunData, name: str) -> list[tuple[int, list[float]]]:
    """(tokens, finite values over layers) of each line that has the measure."""
    found = ((line["tokens"], [v for v in line.get(name, ()) if v is not None]) for line in run.routing)
    return [(tokens, values) for tokens, values in found if values]


def _texts(run: RunData) -> Any:
    """A table in colours: texts by experts."""
    from matplotlib import pyplot

    assert run.texts is not None
    names, shares = run.texts
    look: dict[str, Any] = {"figsize": (11.5, 1.3 + 0.45 * len(names)), "layout": "constrained"}
    figure, axes = pyplot.subplots(**look)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(shares[0])))
    axes.set(xlabel="expert")
    axes.grid(False)
    figure.suptitle(f"{run.name}: which experts each text goes to", x=0.01, ha="left", weight="bold")
    return figure


def _load_map(run: RunData) -> Any:
    """Load of every expert: layers by experts at the first, middle and last line, and all lines over time."""
    import numpy
    from matplotlib import pyplot

    # [lines, layers, experts], as powers of two of the even share; a dead expert is darkest.
    loads = numpy.array([line["load"] for line in run.routing])
    count, num_layers, num_experts = loads.shape
    powers = numpy.log2(numpy.maximum(loads * num_experts, 2.0 ** (-EVEN_RANGE - 1)))
    height = min(9.0, max(3.3, 1.6 + 0.055 * num_layers * num_experts))
    look = {"figsize": (11.5, height), "width_ratios": (1, 1, 1, 2.6), "layout": "constrained"}
    figure, (*snapshots, timeline) = pyplot.subplots(1, 4, **look)
    shares: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -EVEN_RANGE, "vmax": EVEN_RANGE}
    named = range(0, num_layers, math.ceil(num_layers / MOST_LABELS))
    labels = [str(run.routing[-1]["layers"][row]) for row in named]
    for panel, at in zip(snapshots, (0, count // 2, count - 1), strict=True):
        image = panel.imshow(powers[at], aspect="auto", interpolation="nearest", **shares)
        panel.set(title=f"step {run.routing[at]['iteration']}", xlabel="expert")
        panel.set_yticks(named, labels)
    snapshots[0].set_ylabel("layer")
    if count > 1:  # over tokens, all experts of the first layer, then of the next
        rows = powers.reshape(count, -1).T
        tokens = [line["tokens"] for line in run.routing]
        timeline.pcolormesh(tokens, range(len(rows)), rows, shading="nearest", **shares)
        timeline.invert_yaxis()
        for layer in range(1, num_layers):
            timeline.axhline(layer * num_experts - 0.5, color="black", linewidth=0.8)
        timeline.set_yticks([(row + 0.5) * num_experts - 0.5 for row in named], labels)
    timeline.set(title="over time, a line an expert, by layer", xlabel="tokens")
    for panel in (*snapshots, timeline):
        panel.grid(False)
        panel.tick_params(length=0)
    bar = figure.colorbar(image, ax=[*snapshots, timeline], pad=0.01, fraction=0.025, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "even", "2×", "4×"])
    figure.suptitle(f"{run.name}: load of each expert", x=0.01, ha="left", weight="bold")
    return figure
