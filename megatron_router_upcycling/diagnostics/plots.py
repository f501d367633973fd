"""The pictures of a report, one function each, from the lines that a run's files hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = ("#c8401e", "#2867b2", "#3a9a4b", "#8a4fb0", "#c79a00", "#444444", "#00999c", "#d2679a")
GREY = "#8a8a8a"
EVEN_RANGE = 2  # load maps show shares from 1/4 to 4 times the even one, in powers of two
MOST_LABELS = 16  # of layers beside a load map
MOST_NAMES = 4  # of runs side by side in a legend


@dataclass(frozen=True)
class RunData:
    """What one run left: its name in the report, the lines of its two files, and its manifest."""

    name: str
    losses: list[dict[str, Any]]
    routing: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)

    def lines(self, kind: str, **values: Any) -> list[dict[str, Any]]:
        """Lines of run.jsonl with a loss, the last of each iteration."""
        found = {}
        for line in self.losses:
            wanted = line.get("kind") == kind and all(line.get(k) == v for k, v in values.items())
            if wanted and line.get("lm_loss") is not None:
                found[line["iteration"]] = line
        return [found[iteration] for iteration in sorted(found)]

    @property
    def rare(self) -> list[dict[str, Any]]:
        """Lines of routing.jsonl with the rare measures on top of the others."""
        return [line | line["rare"] for line in self.routing if line.get("rare")]


LOOK = {
    "font.size": 9.5,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 110,
}


def draw_all(runs: Sequence[RunData], folder: Path) -> dict[str, Path]:
    """Draw what the runs have data for: key of the picture -> its PNG in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routed = [(i, run) for i, run in enumerate(runs) if run.routing]
    pictures: dict[str, Callable[[], Any]] = {"loss": lambda: _loss(runs)}
    if routed:
        pictures |= {"load": lambda: _grid(routed, LOAD, 3), "routing": lambda: _grid(routed, ROUTING, 3)}
        pictures |= {f"load_map_{index + 1}": partial(_load_map, run) for index, run in routed}
    if any(run.rare for _, run in routed):
        pictures["specialisation"] = lambda: _grid(routed, SPECIALISATION, 3)
    drawn = {}
    with pyplot.rc_context(LOOK):
        for key, draw in pictures.items():
            figure = draw()
            drawn[key] = folder / f"{key}.png"
            figure.savefig(drawn[key], metadata={"Software": None})
            pyplot.close(figure)
    return drawn


def colour(index: int) -> str:
    """Of the run at ``index``, in pictures and in the table."""
    return COLOURS[index % len(COLOURS)]


def _tokens(number: float, position: Any = None) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def _loss(runs: Sequence[RunData]) -> Any:
    """Training loss as lines, held-out loss as points; on the right the last two thirds."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11.5, 4.3), width_ratios=(1, 1), layout="constrained"
    )
    last = max((line["tokens"] for run in runs for line in run.losses), default=1)
    shown: list[float] = []
    for axes, start in ((left, 0.0), (right, last / 3)):
        for index, run in enumerate(runs):
            train = [line for line in run.lines("train") if line["tokens"] >= start]
            held = [line for line in run.lines("held_out", set="validation") if line["tokens"] >= start]
            x, y = ([line[key] for line in train] for key in ("tokens", "lm_loss"))
            axes.plot(x, y, color=colour(index), linewidth=1.7, label=run.name)
            points = ([line[key] for line in held] for key in ("tokens", "lm_loss"))
            axes.plot(*points, "o", ms=6, color=colour(index), markeredgecolor="white", zorder=5)
            if start:
                shown += y + [line["lm_loss"] for line in held]
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(_tokens)
    left.set_title("LM loss: line training, points held out")
    left.set_ylabel("nats a token")
    left.legend()
    right.set_title("the last two thirds")
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.01
        right.set_ylim(min(shown) - margin, max(shown) + margin)
    return figure


# Panels of the small multiples: measure -> (title, a line of what even or ideal would be, by the number of
# experts), in the order they are drawn.
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


def _grid(routed: Sequence[tuple[int, RunData]], panels: Panels, columns: int) -> Any:
    """Small multiples over tokens, one a measure that any run has."""
    from matplotlib import pyplot

    present = {name: panel for name, panel in panels.items() if any(_series(run, name) for _, run in routed)}
    rows = math.ceil(len(present) / columns)
    size = (11.5, 2.75 * rows + 0.5)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.11, w_pad=0.08)
    for axes, (name, (title, ideal)) in zip(grid.flat, present.items(), strict=False):
        _panel(axes, routed, name, ideal)
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
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
    axes.xaxis.set_major_formatter(_tokens)
    if all(v == 0 for _, run in routed for _, values in _series(run, name) for v in values):
        axes.set_ylim(-0.05, 1)


def _series(run: RunData, name: str) -> list[tuple[int, list[float]]]:
    """(tokens, finite values over layers) of each line that has the measure."""
    lines = run.routing if any(name in line for line in run.routing) else run.rare
    found = []
    for line in lines:
        values = [value for value in line.get(name, ()) if value is not None]
        if values:
            found.append((line["tokens"], values))
    return found


def _load_map(run: RunData) -> Any:
    """Every layer's experts: three snapshots, layers by experts, and all of them over time."""
    import numpy
    from matplotlib import pyplot

    # [lines, layers, experts], as powers of two of the even share; a dead expert is darkest.
    loads = numpy.array([line["load"] for line in run.routing])
    _, num_layers, num_experts = loads.shape
    powers = numpy.log2(numpy.maximum(loads * num_experts, 2.0 ** (-EVEN_RANGE - 1)))
    height = min(9.0, max(3.3, 1.6 + 0.055 * num_layers * num_experts))
    figure, axes = pyplot.subplots(
        1, 4, figsize=(11.5, height), width_ratios=(1, 1, 1, 2.6), layout="constrained"
    )
    for panel in axes:
        panel.grid(False)
        panel.tick_params(length=0)
    image = _snapshots(axes[:3], run, powers)
    _over_time(axes[3], run, powers)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.025, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "even", "2×", "4×"])
    figure.suptitle(f"{run.name}: load of each expert", x=0.01, ha="left", weight="bold")
    return figure


SHARES: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -EVEN_RANGE, "vmax": EVEN_RANGE}


def _snapshots(panels: Any, run: RunData, powers: Any) -> Any:
    """The first, middle and last line, each layers by experts; returns one of the images."""
    image = None
    chosen = sorted({0, len(powers) // 2, len(powers) - 1})
    for panel, at in zip(panels, chosen, strict=False):
        image = panel.imshow(powers[at], aspect="auto", interpolation="nearest", **SHARES)
        panel.set_title(f"step {run.routing[at]['iteration']}")
        panel.set_xlabel("expert")
        _label_layers(panel, run, lambda row: row)
    for panel in panels[len(chosen) :]:
        panel.axis("off")
    panels[0].set_ylabel("layer")
    return image


def _over_time(panel: Any, run: RunData, powers: Any) -> None:
    """Every line: over tokens, all experts of the first layer, then of the next."""
    _, num_layers, num_experts = powers.shape
    flat = powers.reshape(len(powers), -1).T
    edges = _edges([line["tokens"] for line in run.routing])
    panel.pcolormesh(edges, range(len(flat) + 1), flat, **SHARES)
    panel.invert_yaxis()
    for row in range(1, num_layers):
        panel.axhline(row * num_experts, color="black", linewidth=0.8)
    _label_layers(panel, run, lambda row: (row + 0.5) * num_experts)
    panel.set_title("over time, a line an expert, by layer")
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(_tokens)


def _label_layers(panel: Any, run: RunData, place: Callable[[int], float]) -> None:
    """Number at most MOST_LABELS of the layers, each at the ``place`` of its row."""
    from matplotlib.ticker import FixedLocator

    layers = run.routing[-1]["layers"]
    rows = range(0, len(layers), math.ceil(len(layers) / MOST_LABELS))
    panel.yaxis.set_major_locator(FixedLocator([place(row) for row in rows]))
    panel.set_yticklabels([str(layers[row]) for row in rows])


def _edges(centres: list[int]) -> list[float]:
    """Cell borders around ascending ``centres``."""
    if len(centres) == 1:
        return [0.0, float(2 * centres[0] or 1)]
    middle = [(a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)]
    return [centres[0] - (middle[0] - centres[0]), *middle, centres[-1] + (centres[-1] - middle[-1])]
