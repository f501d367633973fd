"""The records of a task: from a local folder, from the Hugging Face Hub, or made here; none brings code."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, described
from megatron_router_upcycling.evaluation import stdlib_task
from megatron_router_upcycling.evaluation.paper import Task

EXAMPLES_SPLIT = "train"  # of which few-shot examples are drawn, for every task


@dataclass(frozen=True)
class Records:
    """A task's records, each reduced to the task's fields."""

    splits: dict[str, list[dict[str, Any]]]  # the one that is asked, and ``train`` for few-shot examples
    origin: str  # where they come from, in words

    def digest(self) -> str:
        """SHA-256 over the records as JSON: the same for the same data, wherever it came from."""
        return hashlib.sha256(json.dumps(self.splits, sort_keys=True).encode()).hexdigest()


def load(tasks: Sequence[Task], data_dir: Path | None, num_fewshot: int) -> dict[str, Records]:
    """The records of ``tasks``, by task name.

    Args:
        data_dir: where given, all data is read from there and nothing is downloaded.
        num_fewshot: examples before each question; none needs no ``train`` split.
    """
    records = {}
    for task in tasks:
        splits = [task.split] + [EXAMPLES_SPLIT] * (num_fewshot > 0)
        if task.repository is None:
            made = stdlib_task.records()
            rows, origin = {split: made[split] for split in splits}, "made of the Python standard library"
        elif data_dir is not None:
            rows, origin = {split: _read(data_dir, task, split) for split in splits}, "local"
        else:
            rows, origin = _download(task, splits), "Hugging Face Hub"
        records[task.name] = Records(rows, origin)
        examples = len(rows.get(EXAMPLES_SPLIT, ()))
        if examples < num_fewshot:
            raise UserError(f"--num-fewshot {num_fewshot}: {task.name} has {examples} examples to show")
    return records


def _needs(task: Task, splits: Iterable[str]) -> str:
    """A task with its data set and splits, for a message."""
    data_set = " ".join(filter(None, (task.repository, task.configuration)))
    return f"{task.name} ({data_set}: {', '.join(splits)})"


def _files(folder: Path, split: str) -> list[Path]:
    """A split's files: one of JSON lines, one of Parquet, the Hub's numbered ones, or a saved data set."""
    for pattern in ("{}.jsonl", "{}.parquet", "{}-*-of-*.parquet", "{}/dataset_info.json"):
        if found := sorted(folder.glob(pattern.format(split))):
            return found
    return []


def _read(data_dir: Path, task: Task, split: str) -> list[dict[str, Any]]:
    files = _files(data_dir / task.name, split)
    if not files:
        raise UserError(
            f"--data-dir {data_dir}: no data for {_needs(task, [split])}: put it at {data_dir}/{task.name}/"
            f"{split}.jsonl or .parquet, or leave the task out of --tasks"
        )
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            rows += [{field: row[field] for field in task.fields} for row in _read_file(path)]
            if not rows:
                raise ValueError("it has no records")
        except Exception as error:  # pyarrow, json and datasets each have errors of their own
            raise UserError(
                f"{path}: cannot be used ({described(error)}); put the data of {_needs(task, [split])} there"
            ) from error
    return rows


def _read_file(path: Path) -> Iterable[dict[str, Any]]:
    import datasets
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        return map(json.loads, filter(str.strip, path.read_text(encoding="utf-8").split("\n")))
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return datasets.load_from_disk(str(path.parent)).to_list()


def _download(task: Task, splits: list[str]) -> dict[str, list[dict[str, Any]]]:
    import datasets

    for library in ("datasets", "huggingface_hub"):  # a line for each of many attempts
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(task.repository, task.configuration)
        return {split: found[split].select_columns(list(task.fields)).to_list() for split in splits}
    except Exception as error:  # a dozen classes of four libraries, for want of network among others
        raise UserError(
            f"{_needs(task, splits)} could not be downloaded ({described(error)}): fetch it elsewhere, put it"
            f" at FOLDER/{task.name}/{splits[0]}.jsonl or .parquet and pass --data-dir FOLDER"
        ) from error
