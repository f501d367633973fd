"""One page over training runs: losses, what the routers did, what the experts became.

The page holds its pictures and styles and needs neither network nor scripts.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.diagnostics import plots
from megatron_router_upcycling.diagnostics.plots import COLOURS, RunData
from megatron_router_upcycling.errors import UserError, shown
from megatron_router_upcycling.training.run_log import files

PAGE = "report.html"
# Section -> (title, what its picture shows).
SECTIONS = {
    "loss": (
        "Loss",
        "LM loss in nats a token. Lines: training, each point the mean since the one before. Points: held-out"
        " loss, each evaluation on the next samples of the held-out data. Runs with the same seed and data"
        " saw the same tokens in the same order.",
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
    "specialisation": (
        "Specialisation",
        "Experts start as copies: their distance, over their norm, is 0 at first and 1.41 when they have"
        " nothing in common. Changes are since the run's start, over the norm. Agreement is how often one"
        " router's first choice is the mixture's (dashed: by chance).",
    ),
}
ARROW = " → "


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """What the runs that saved to ``folders`` left there.

    Raises:
        UserError: a folder without run.jsonl, or the same one twice.
    """
    seen: set[Path] = set()
    for folder in folders:
        if not (folder / files.RUN).is_file():
            raise UserError(f"{folder}: no {files.RUN} there; name a folder that pretrain saves to")
        if folder.resolve() in seen:
            raise UserError(f"{folder}: is named twice")
        seen.add(folder.resolve())
    runs = []
    for name, folder in zip(_names([folder.resolve() for folder in folders]), folders, strict=True):
        routing = [line for line in files.read(folder / files.ROUTING) if line.get("load")]
        alike = [line for line in routing if line["layers"] == routing[-1]["layers"]]
        losses = files.read(folder / files.RUN)
        if not any(line.get("lm_loss") is not None for line in losses):
            raise UserError(f"{folder / files.RUN}: no loss in it yet; wait for the run's first lines")
        runs.append(RunData(name, losses, alike, manifest.read(folder) or {}))
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def write(runs: Sequence[RunData], output: Path) -> Path:
    """Draw the pictures into ``output`` and write the page; return its path.

    Raises:
        UserError: ``output`` cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stale in output.glob("load_map_*.png"):  # an earlier report may have had more runs
            stale.unlink()
        drawn = plots.draw_all(runs, output)
        page = output / PAGE
        page.write_text(render(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    return page


def render(runs: Sequence[RunData], drawn: dict[str, Path]) -> str:
    """The page, with the pictures in it."""
    parts = [f"<h1>{html.escape(' · '.join(run.name for run in runs))}</h1>", _summary(runs)]
    for section, (title, text) in SECTIONS.items():
        pictures = [p for key, p in drawn.items() if key == section or key.rpartition("_")[0] == section]
        if not pictures:
            continue
        images = "".join(_image(path, title) for path in pictures)
        parts.append(f"<section><h2>{title}</h2><p>{text}</p>{images}</section>")
    parts.append(_options(runs))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Router Upcycling: runs</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


STYLE = """
:root { color-scheme: light }
body { margin: 0; background: #f4f3f0; color: #222; font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 25px; margin: 0 0 18px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 0 0 4px }
section { background: #fff; border: 1px solid #e3e0da; border-radius: 8px; padding: 18px 22px }
section { margin: 18px 0 }
p { margin: 0 0 12px; color: #555; max-width: 95ch }
img { display: block; width: 100%; height: auto; margin-top: 8px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: right; padding: 6px 7px; border-bottom: 1px solid #e8e5df; white-space: nowrap }
th { color: #666; font-weight: 600; vertical-align: bottom; white-space: normal }
th small { display: block; font-weight: 400; color: #888; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.router, th.router { text-align: left; white-space: normal; min-width: 130px }
table.options td + td { white-space: normal; overflow-wrap: anywhere }
td.best { font-weight: 700 }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px }
"""


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(f"{title}: {path.stem}")}" src="data:image/png;base64,{data}">'


def _summary(runs: Sequence[RunData]) -> str:
    rows = [_row(run) for run in runs]
    held = [row["held_out"] for row in rows if row["held_out"] is not None]
    # Most runs drop nothing: the column appears where one does.
    dropping = any(any(line["dropped_fraction"]) for run in runs for line in run.routing)
    columns_over_time = [name for name in OVER_TIME if dropping or name != "dropped_fraction"]
    cells = []
    for index, (run, row) in enumerate(zip(runs, rows, strict=True)):
        chip = f'<span class="chip" style="background:{COLOURS[index % len(COLOURS)]}"></span>'
        best = len(held) > 1 and row["held_out"] == min(held)
        columns = [
            f"<td>{chip}{html.escape(run.name)}</td>",
            f'<td class="router">{html.escape(row["router"])}</td>',
            f"<td>{row['tokens']:,}</td>",
            f"<td>{_number(row['training'], '.4f')}</td>",
            f'<td class="best">{_number(row["held_out"], ".4f")}</td>'
            if best
            else f"<td>{_number(row['held_out'], '.4f')}</td>",
        ]
        columns += [f"<td>{row[name]}</td>" for name in columns_over_time]
        cells.append(f"<tr>{''.join(columns)}</tr>")
    titles = (OVER_TIME[name][0] for name in columns_over_time)
    over_time = "".join(f"<th>{title}<small>start{ARROW}end</small></th>" for title in titles)
    return (
        '<section><div class="scroll"><table><thead><tr><th>run</th><th class="router">router</th>'
        "<th>tokens</th><th>training loss<small>last line</small></th>"
        "<th>held-out loss<small>last</small></th>"
        f"{over_time}</tr></thead><tbody>{''.join(cells)}</tbody></table></div></section>"
    )


# Measure -> (column's title, how a run's first and last value are written).
OVER_TIME = {
    "load_max_over_mean": ("busiest over mean", ".2f"),
    "dead_experts": ("dead experts", ".0f"),
    "entropy": ("entropy", ".2f"),
    "weight_sum": ("sum of k weights", ".2f"),
    "dropped_fraction": ("dropped", ".1%"),
}


def _row(run: RunData) -> dict[str, Any]:
    train, held = run.lines("train"), run.lines("held_out", set="validation")
    row: dict[str, Any] = {
        "router": _router(run.manifest.get("router")),
        "tokens": max(line["tokens"] for line in run.losses),
        "training": train[-1]["lm_loss"] if train else None,
        "held_out": held[-1]["lm_loss"] if held else None,
    }
    for name, (_, form) in OVER_TIME.items():
        # Dead experts add up over the layers; of the others the mean says more.
        combine = sum if name == "dead_experts" else mean
        ends = [combine(run.routing[at][name]) for at in (0, -1)] if run.routing else [None, None]
        row[name] = ARROW.join(_number(value, form) for value in ends) if run.routing else "–"
    return row


def _router(options: Any) -> str:
    """A router in a few words: its kind, numbers, and the order of softmax and top-k."""
    if not isinstance(options, dict):
        return "dense or unknown"
    kind, n, k = (shown(options.get(name)) for name in ("router", "num_experts", "top_k"))
    routers = f" of {shown(options['num_routers'])}, {shown(options.get('pooling'))}"
    order = "softmax first" if options.get("pre_softmax") else "top-k first"
    return f"{kind}{routers * (kind == 'mixture')}; {k} of {n}; {order}"


OF_MIXTURE = ("num_routers", "pooling", "grouping")
PAPER = InitConfig().to_dict()  # what goes without saying of a start


def _options(runs: Sequence[RunData]) -> str:
    """What the converter recorded of each run's model, a column a run."""
    columns = []
    for run in runs:
        record = run.manifest
        source, router, init = (
            part if isinstance(part := record.get(name), dict) else {}
            for name in ("source", "router", "init")
        )
        values = {
            name: value
            for name, value in router.items()
            if name not in OF_MIXTURE or router.get("router") == "mixture"
        }
        values |= {name: value for name, value in init.items() if value != PAPER.get(name)}
        values |= {"seed": record.get("seed"), "dense checkpoint": source.get("path")}
        values |= {"its iteration": source.get("iteration")}
        columns.append({name: shown(value) for name, value in values.items() if value is not None})
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td>"
        + "".join(f"<td>{html.escape(column.get(name, '–'))}</td>" for column in columns)
        + "</tr>"
        for name in names
    )
    return (
        "<section><h2>Conversion</h2><p>What router_upcycling.json records of each run's model.</p>"
        f'<div class="scroll"><table class="options"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def summary_lines(runs: Sequence[RunData]) -> list[str]:
    """One line a run, for a terminal."""
    lines = []
    for run in runs:
        row = _row(run)
        lines.append(
            f"{run.name}: {row['router']}; {row['tokens']:,} tokens; held-out loss"
            f" {_number(row['held_out'], '.4f')}; busiest expert over mean {row['load_max_over_mean']};"
            f" dead experts {row['dead_experts']}"
        )
    return lines
