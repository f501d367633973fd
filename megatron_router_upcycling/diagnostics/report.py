"""The content of the HTML report on training runs; its layout is in ``templates/report.html.j2``."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.diagnostics import plots, routing_start
from megatron_router_upcycling.diagnostics.plots import RunData
from megatron_router_upcycling.errors import UserError, os_error_as, shown
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.run_log import files

# Section -> (title, what its picture shows).
SECTIONS = {
    "loss": (
        "Loss",
        "LM loss in nats a token. Lines: training, each point the mean since the one before. Points: held-out"
        " loss, each evaluation on the next samples of the held-out data.",
    ),
    "load": (
        "Load of the experts",
        "Lines are means over the layers, bands reach from the lowest layer to the highest, dashes mark an"
        " even load. Load counts the choices of one global batch.",
    ),
    "load_map": (
        "Where the tokens go",
        "White is an even share of a layer's choices, red more, blue less; the darkest blue is an expert with"
        " next to nothing. On the right, each line is one expert from the run's start to its end.",
    ),
    "routing": (
        "How sure the routers are",
        "Entropy and the largest probability are of the routing distribution over all experts. The k weights"
        " sum to 1 when softmax follows top-k; where it comes first, their sum scales the FFN's output.",
    ),
    "texts": (
        "Which experts each text goes to",
        "Of the texts whose samples made the routers: the share of a text's choices that each expert gets in"
        " the last checkpoint, in percent, means over layers. The samples are of the dense model's layers.",
    ),
    "specialisation": (
        "Specialisation",
        "Experts start as copies: their distance, over their norm, is 0 at first and 1.41 when they have"
        " nothing in common. Changes are since the run's start, over the norm. Agreement is how often one"
        " router's first choice is the mixture's (dashed: by chance).",
    ),
}
# Measure -> (column's title, number format of a run's first and last value).
OVER_TIME = {
    "load_max_over_mean": ("busiest over mean", ".2f"),
    "dead_experts": ("dead experts", ".0f"),
    "entropy": ("entropy", ".2f"),
    "weight_sum": ("sum of k weights", ".2f"),
    "dropped_fraction": ("dropped", ".1%"),
}
LOSSES, NOTHING = ("train", "held_out"), "–"
NO_VALIDATION = "no validation yet, or it is off (eval_iters 0, which submit.sh sets below 200 documents)"


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the logs and manifests of the runs that saved to ``folders``."""
    common = os.path.commonpath([folder.resolve().parent for folder in folders])
    runs = []
    for folder in folders:
        if not (folder / files.RUN).is_file():
            raise UserError(f"{folder}: no {files.RUN} there; name a folder that pretrain saves to")
        lines = [line | (line.get("rare") or {}) for line in files.read(folder / files.ROUTING)]
        routing = [line for line in lines if line.get("load")]
        alike = [line for line in routing if line["layers"] == routing[-1]["layers"]]
        losses = files.read(folder / files.RUN)
        if not any(line.get("lm_loss") is not None for line in losses):
            raise UserError(f"{folder / files.RUN}: no loss in it yet; wait for the run's first lines")
        name = str(folder.resolve().relative_to(common))
        record = manifest.read(folder) or {}
        runs.append(RunData(name, losses, alike, record, routing_start.texts(folder)))
    return runs


def write(runs: Sequence[RunData], output: Path) -> Path:
    """Draw the pictures into ``output`` and write the page; return its path."""
    with os_error_as(f"--output {output}: cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        for name in ("load_map_*.png", "texts_*.png"):  # an earlier report may have had more runs
            for stale in output.glob(name):
                stale.unlink()
        drawn = plots.draw_all(runs, output)
        page = output / "report.html"
        page.write_text(render(runs, drawn), encoding="utf-8")
    return page


def render(runs: Sequence[RunData], drawn: dict[str, list[Path]]) -> str:
    """The HTML page, with the plots embedded."""
    import jinja2

    templates = jinja2.Environment(loader=jinja2.PackageLoader(__package__), autoescape=True)
    return templates.get_template("report.html.j2").render(
        runs=[row | {"colour": plots.colour(index)} for index, row in enumerate(summary(runs))],
        over_time={name: title for name, (title, _) in OVER_TIME.items()},
        sections=[
            {
                "title": title,
                "text": text,
                "images": [
                    {"alt": f"{title}: {path.stem}", "data": base64.b64encode(path.read_bytes()).decode()}
                    for path in drawn[name]
                ],
            }
            for name, (title, text) in SECTIONS.items()
            if name in drawn
        ],
        conversion=conversion(runs),
        no_validation=NO_VALIDATION,
        nothing=NOTHING,
    )


def summary(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """For each run name, router, last losses and measures over time as text; ``best``: lowest loss of all."""
    last = [{kind: [line["lm_loss"] for line in run.lines(kind)[-1:]] for kind in LOSSES} for run in runs]
    compared = [loss for losses in last for loss in losses["held_out"]]
    rows = []
    for run, losses in zip(runs, last, strict=True):
        row = {
            "name": run.name,
            "router": _router(run.manifest.get("router")),
            "tokens": f"{max(line['tokens'] for line in run.losses):,}",
            "training": f"{losses['train'][0]:.4f}" if losses["train"] else NOTHING,
            "held_out": f"{losses['held_out'][0]:.4f}" if losses["held_out"] else NOTHING,
            "best": len(compared) > 1 and losses["held_out"] == [min(compared)],
        }
        rows.append(row | {name: _over_time(run, name) for name in OVER_TIME})
    return rows


def _over_time(run: RunData, measure: str) -> str:
    """The run's first and last value, as mean over layers; dead experts are summed over layers."""
    if not run.routing:
        return NOTHING
    combine = sum if measure == "dead_experts" else mean
    first, last = (combine(run.routing[at][measure]) for at in (0, -1))
    form = OVER_TIME[measure][1]
    return f"{first:{form}} → {last:{form}}"


def _router(options: Any) -> str:
    """A router in a few words: its kind, numbers, and the order of softmax and top-k."""
    if not isinstance(options, dict):
        return "dense or unknown"
    names = ("router", "num_experts", "top_k", "num_routers", "pooling")
    kind, n, k, num_routers, pooling = (shown(options.get(name)) for name in names)
    routers = f" of {num_routers}, {pooling}" if kind in kinds.names_with("num_routers") else ""
    order = "softmax first" if options.get("pre_softmax") else "top-k first"
    return f"{kind}{routers}; {k} of {n}; {order}"


def conversion(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Conversion options from the manifests that are not default in all runs: name -> a value a run."""
    usual = RouterConfig.RETIRED | RouterConfig().to_dict() | InitConfig.RETIRED | InitConfig().to_dict()
    columns = []
    for run in runs:
        parts = (run.manifest.get(name) for name in ("source", "router", "init"))
        source, router, init = (part if isinstance(part, dict) else {} for part in parts)
        made = {"seed": run.manifest.get("seed"), "dense checkpoint": source.get("path")}
        column = router | init | made | {"its iteration": source.get("iteration")}
        columns.append({name: value for name, value in column.items() if value is not None})
    names = dict.fromkeys(name for column in columns for name in column if column[name] != usual.get(name))
    return {
        name.replace("_", " "): [shown(column.get(name, NOTHING)) for column in columns] for name in names
    }


def summary_lines(runs: Sequence[RunData]) -> list[str]:
    """One line a run, for a terminal."""
    return [
        f"{row['name']}: {row['router']}; {row['tokens']} tokens; held-out loss {row['held_out']}"
        f"{f' ({NO_VALIDATION})' * (row['held_out'] == NOTHING)}; busiest"
        f" expert over mean {row['load_max_over_mean']}; dead experts {row['dead_experts']}"
        for row in summary(runs)
    ]
