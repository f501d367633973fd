"""Write an evaluation's results as JSON, and as a Markdown table with the paper's table 1 for comparison."""

import json
from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, os_error_as
from megatron_router_upcycling.evaluation.paper import GROUPS, METHODS, averages, figures
from megatron_router_upcycling.files import write_whole

FORMAT = 1
COLUMNS = ("this model", "dense model")
JSON_NAME, MARKDOWN_NAME = "results.json", "results.md"
NOTES = """\
Percent. ± is the standard error over a task's questions; chance is what answers drawn at random score.
Log-likelihoods are computed in float32 from the model's logits, whatever its dtype.
"""
NOTES_PAPER = """\
Averages are plain means; the last is over tasks, not over groups. The six columns on the right are the
paper's (arXiv 2509.00679, table 1: 2.1B parameters, 100B tokens), with averages of the same tasks as this
model's. Over all tasks that gives what the paper prints but for two roundings: it has 26.17 for switch's
average and 48.67 for mlp's reasoning.

The paper's questions were not quite these: its ARC figures are fractions of 295 and 567, which fits the
validation splits (299 and 570 questions), while the harness asks the test splits (1172 and 2376). Between two
models that were evaluated here a difference says more than between one of them and the paper's columns.
"""


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds results."""
    if output.is_file() or (not overwrite and any((output / n).exists() for n in (JSON_NAME, MARKDOWN_NAME))):
        raise UserError(f"--output {output}: holds results; name another folder, or pass --overwrite")


def add_averages(result: dict[str, Any]) -> None:
    """Add the averages over the tasks finished so far to ``result``."""
    scores = {name: task["score"] for name, task in result["tasks"].items()}
    result["averages"] = averages(scores)
    result["paper"] = {method: figures(method, scores) for method in METHODS}


def write(output: Path, result: Mapping[str, Any]) -> None:
    """Write ``results.json`` and ``results.md`` into ``output``, each whole or not at all."""
    with os_error_as(f"--output {output}: cannot be written", "; name another"):
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / JSON_NAME, json.dumps(result, indent=2, default=str) + "\n")
        write_whole(output / MARKDOWN_NAME, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    options = result["options"]
    models = [result["model"], *([result["dense"]["model"]] if "dense" in result else [])]
    lines = [f"# Evaluation of {_name(models[0])}", ""]
    lines += [
        f"{column}: {_name(model)}, {model['architecture']}, {model['parameters']:,} parameters,"
        f" {model['dtype']}."
        for column, model in zip(COLUMNS, models, strict=False)
    ]
    lines += ["", f"{options['device']}; {options['num_fewshot']} examples before each question."]
    if any(task["questions"] < task["questions_of"] for task in result["tasks"].values()):
        lines.append(f"**Only the first {options['limit']} questions of a task were asked: no measurement.**")
    lines += ["", table(result), "", NOTES]
    if result["averages"]:
        lines += [NOTES_PAPER]
    lines += ["Versions: " + ", ".join(f"{name} {value}" for name, value in result["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def _name(model: Mapping[str, Any]) -> str:
    """A folder's name with its parent's, since many models are in a folder named ``hf``."""
    return "/".join(Path(model["path"]).parts[-2:])


def table(result: Mapping[str, Any]) -> str:
    """The scores with chance, the dense model's and the paper's, as an aligned Markdown table."""
    found = [result, *([result["dense"]] if "dense" in result else [])]
    methods = METHODS if result["averages"] else ()  # no columns of the paper if no task is the paper's
    rows = [["task", "metric", *COLUMNS[: len(found)], "chance", *methods]]
    for group in (*GROUPS, None, "average"):
        for name, task in result["tasks"].items():
            if task["group"] == group:
                scores = [percent(*map(model["tasks"][name].get, ("score", "stderr"))) for model in found]
                paper = [percent(result["paper"][method].get(name)) for method in methods]
                rows.append([task["title"], task["metric"], *scores, percent(task["chance"]), *paper])
        if group and group in result["averages"]:
            rows.append(_average_row(group, found))
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    """Markdown table: the first row is the header, the first two columns are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], "-" * widths[1], *("-" * (width - 1) + ":" for width in widths[2:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        words, numbers = map(str.ljust, row[:2], widths), map(str.rjust, row[2:], widths[2:])
        lines.append(f"| {' | '.join([*words, *numbers])} |")
    return "\n".join(lines)


def percent(value: float | None, error: float | None = None) -> str:
    """``value`` with two decimals, rounded half up as in the paper, and ``error``; a dash for None."""
    if value is None:
        return "-"
    rounded = str(Decimal(repr(round(value, 6))).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return rounded if error is None else f"{rounded} ± {percent(error)}"


def _average_row(group: str, found: list[Mapping[str, Any]]) -> list[str]:
    average = found[0]["averages"][group]
    partial = "" if average["complete"] else f" ({len(average['tasks'])} of {average['of']} tasks)"
    by_chance = averages({name: task["chance"] or 0.0 for name, task in found[0]["tasks"].items()})
    paper = [averages(found[0]["paper"][method])[group]["score"] for method in METHODS]
    title = "**average**" if group == "average" else f"*{group}*"
    scores = [model["averages"][group]["score"] for model in found]
    return [title + partial, "", *map(percent, (*scores, by_chance[group]["score"], *paper))]
