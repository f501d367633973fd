"""Load a task's records from a folder or the Hugging Face Hub, or make them. Runs no code of a data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, described, error_as
from megatron_router_upcycling.evaluation import stdlib_task
from megatron_router_upcycling.evaluation.paper import Task

EXAMPLES_SPLIT = "train"  # the split from which few-shot examples are drawn, for every task
Splits = dict[str, list[dict[str, Any]]]  # split -> records: the evaluated split, and ``train`` for few-shot


def load(tasks: Sequence[Task], data_dir: Path | None, num_fewshot: int) -> dict[str, tuple[Splits, str]]:
    """Task name -> its records, each reduced to the task's fields, and where they come from: ``data_dir``, or
    without one the Hub."""
    records = {}
    for task in tasks:
        names = [task.split] + [EXAMPLES_SPLIT] * (num_fewshot > 0)
        if task.repository is None:
            made = stdlib_task.records()
            splits, origin = {name: made[name] for name in names}, "made of the Python standard library"
        elif data_dir is not None:
            splits, origin = {name: _read(data_dir, task, name) for name in names}, "local"
        else:
            splits, origin = _download(task, names), "Hugging Face Hub"
        examples = len(splits.get(EXAMPLES_SPLIT, ()))
        if examples < num_fewshot:
            raise UserError(f"--num-fewshot {num_fewshot}: {task.name} has {examples} examples to show")
        records[task.name] = splits, origin
    return records


def _read(data_dir: Path, task: Task, split: str) -> list[dict[str, Any]]:
    """Read a split from JSON lines, Parquet (one file, or several as on the Hub), or a saved data set."""
    import datasets
    import pyarrow.parquet

    place = data_dir / task.name / split
    lines, tables = place.with_name(f"{split}.jsonl"), (f"{split}.parquet", f"{split}-*-of-*.parquet")
    files = sorted(path for pattern in tables for path in place.parent.glob(pattern))
    fault = f"--data-dir {data_dir}: no data for {_needs(task, [split])}, or they cannot be used"
    way_out = f"; put them at {lines} or .parquet, or leave the task out of --tasks"
    with error_as(Exception, fault, way_out, described):  # pyarrow and datasets have errors of their own
        if lines.is_file():
            text = lines.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif files:
            rows = pyarrow.parquet.read_table(files).to_pylist()
        else:
            rows = datasets.load_from_disk(str(place)).to_list()
        if not rows:
            raise ValueError("it has no records")
        return [{field: row[field] for field in task.fields} for row in rows]


def _download(task: Task, splits: list[str]) -> Splits:
    import datasets

    place = f"FOLDER/{task.name}/{splits[0]}.jsonl or .parquet"
    way_out = f": fetch it elsewhere, put it at {place} and pass --data-dir FOLDER"
    # A dozen classes from four libraries, as without a network.
    with error_as(Exception, f"{_needs(task, splits)} could not be downloaded", way_out, described):
        found = datasets.load_dataset(task.repository, task.configuration)
        return {split: found[split].select_columns(list(task.fields)).to_list() for split in splits}


def _needs(task: Task, splits: list[str]) -> str:
    """A task's name with its data set and splits, for a message."""
    data_set = " ".join(filter(None, (task.repository, task.configuration)))
    return f"{task.name} ({data_set}: {', '.join(splits)})"
