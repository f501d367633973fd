"""What an evaluation found, as JSON and as a Markdown table beside the paper's table 1."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.evaluation.paper import GROUPS, METHODS, averages, figures
from megatron_router_upcycling.files import write_whole

FORMAT = 1
JSON_NAME, MARKDOWN_NAME = "results.json", "results.md"
NOTES = """\
Percent. ± is the standard error over a task's questions. Averages are plain means; the last is over tasks,
not over groups. The six columns on the right are the paper's (arXiv 2509.00679, table 1: 2.1B parameters,
100B tokens), with averages of the same tasks as this model's. Over all tasks that gives what the paper prints
but for two roundings: it has 26.17 for switch's average and 48.67 for mlp's reasoning.

The paper's questions were not quite these: its ARC figures are fractions of 295 and 567, which fits the
validation splits (299 and 570 questions), while the harness asks the test splits (1172 and 2376). Between two
models that were evaluated here a difference says more than between one of them and the paper's columns.
"""


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds results.

    Raises:
        UserError: it does and ``overwrite`` is not set, or it is no folder.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: exists and is not a folder; name another")
    if not overwrite and any((output / name).exists() for name in (JSON_NAME, MARKDOWN_NAME)):
        raise UserError(
            f"--output {output}: holds results; pass --overwrite to replace them or name another folder"
        )


def add_averages(result: dict[str, Any]) -> None:
    """Put the averages of the tasks so far into ``result``."""
    scores = {name: task["score"] for name, task in result["tasks"].items()}
    result["averages"] = {
        name: asdict(average) | {"complete": average.complete} for name, average in averages(scores).items()
    }
    result["paper"] = {method: figures(method, scores) for method in METHODS}


def write(output: Path, result: Mapping[str, Any]) -> None:
    """Write ``results.json`` and ``results.md`` into ``output``, each whole or not at all."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in (
            (JSON_NAME, json.dumps(result, indent=2) + "\n"),
            (MARKDOWN_NAME, markdown(result)),
        ):
            write_whole(output / name, text)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror}); name another folder"
        ) from None


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    model, options = result["model"], result["options"]
    lines = [
        f"# Evaluation of {Path(model['path']).name}",
        "",
        f"{model['architecture']}, {model['parameters']:,} parameters, {model['dtype']}, {options['device']};"
        f" {options['num_fewshot']} examples before each question.",
    ]
    if any(task["questions"] < task["questions_of"] for task in result["tasks"].values()):
        lines.append(f"**Only the first {options['limit']} questions of a task were asked: no measurement.**")
    lines += ["", table(result), "", NOTES]
    lines += ["Versions: " + ", ".join(f"{name} {value}" for name, value in result["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def table(result: Mapping[str, Any]) -> str:
    """The scores beside the paper's, as a Markdown table with aligned columns."""
    tasks = result["tasks"]
    rows = [["task", "metric", "this model", *METHODS]]
    for group in (*GROUPS, None):
        for name, task in tasks.items():
            if task["group"] == group:
                paper = [result["paper"][method].get(name) for method in METHODS]
                rows.append([task["title"], task["metric"], _score(task), *map(percent, paper)])
        if group is not None and group in result["averages"]:
            rows.append(_average_row(group, result))
    if "average" in result["averages"]:
        rows.append(_average_row("average", result))
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    """Markdown: the first row is the head, the first two columns are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], "-" * widths[1], *("-" * (width - 1) + ":" for width in widths[2:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append(f"| {' | '.join(words + numbers)} |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Two digits after the point, halves up as in the paper; a dash for nothing."""
    if value is None:
        return "-"
    return str(Decimal(repr(round(value, 6))).quantize(Decimal("0.01"), ROUND_HALF_UP))


def _score(task: Mapping[str, Any]) -> str:
    return percent(task["score"]) + (f" ± {percent(task['stderr'])}" if task["stderr"] is not None else "")


def _average_row(group: str, result: Mapping[str, Any]) -> list[str]:
    average = result["averages"][group]
    partial = "" if average["complete"] else f" ({len(average['tasks'])} of {average['of']} tasks)"
    paper = [averages(result["paper"][method])[group].score for method in METHODS]
    title = "**average**" if group == "average" else f"*{group}*"
    return [title + partial, "", percent(average["score"]), *map(percent, paper)]
