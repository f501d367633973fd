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
    """A task's records, each reduced to the task's fields, by split.

    Attributes:
        splits: the split that is asked, and ``train`` where few-shot examples are wanted.
        origin: where they come from, in words.
    """

    splits: dict[str, list[dict[str, Any]]]
    origin: str

    def digest(self) -> str:
        """SHA-256 over the records as JSON: the same for the same data, wherever it came from."""
        return hashlib.sha256(json.dumps(self.splits, sort_keys=True).encode()).hexdigest()


def load(tasks: Sequence[Task], data_dir: Path | None, num_fewshot: int) -> dict[str, Records]:
    """The records of ``tasks``, by task name.

    Args:
        data_dir: where given, all data is read from there and nothing is downloaded.
        num_fewshot: examples before each question; none needs no ``train`` split.

    Raises:
        UserError: data is not there, cannot be read or downloaded, or lacks a field.
    """
    wanted = {task.name: _splits(task, num_fewshot) for task in tasks}
    if data_dir is not None:
        _check_all_there([task for task in tasks if task.repository], data_dir, wanted)
    records = {}
    for task in tasks:
        if task.repository is None:
            made = stdlib_task.records()
            splits = {split: made[split] for split in wanted[task.name]}
            records[task.name] = Records(splits, "made of the Python standard library")
        elif data_dir is not None:
            folder = data_dir / task.name
            splits = {split: _read(folder, split, task) for split in wanted[task.name]}
            records[task.name] = Records(splits, "local")
        else:
            records[task.name] = _download(task, wanted[task.name])
        examples = len(records[task.name].splits.get(EXAMPLES_SPLIT, ()))
        if examples < num_fewshot:
            raise UserError(f"--num-fewshot {num_fewshot}: {task.name} has {examples} examples to show")
    return records


def _splits(task: Task, num_fewshot: int) -> tuple[str, ...]:
    return (task.split, EXAMPLES_SPLIT) if num_fewshot else (task.split,)


def _needs(task: Task, splits: Iterable[str]) -> str:
    """A task with its data set and splits, for a message."""
    data_set = " ".join(filter(None, (task.repository, task.configuration)))
    return f"{task.name} ({data_set}: {', '.join(splits)})"


def _check_all_there(tasks: Sequence[Task], data_dir: Path, wanted: dict[str, tuple[str, ...]]) -> None:
    missing = {
        task: [split for split in wanted[task.name] if not _files(data_dir / task.name, split)]
        for task in tasks
    }
    if lacking := [_needs(task, splits) for task, splits in missing.items() if splits]:
        raise UserError(
            f"--data-dir {data_dir}: no data for {'; '.join(lacking)}: put each data set's split at"
            f" {data_dir}/TASK/SPLIT.jsonl or SPLIT.parquet, or leave the task out of --tasks"
        )


def _files(folder: Path, split: str) -> list[Path]:
    """A split's files: one of JSON lines, one of Parquet, the Hub's numbered ones, or a saved data set."""
    for pattern in ("{}.jsonl", "{}.parquet", "{}-*-of-*.parquet", "{}/dataset_info.json"):
        if found := sorted(folder.glob(pattern.format(split))):
            return found
    return []


def _read(folder: Path, split: str, task: Task) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in _files(folder, split):
        try:
            read = _read_file(path)
        except Exception as error:  # pyarrow, json and datasets each have errors of their own
            raise UserError(
                f"{path}: cannot be read ({described(error)}); put {task.repository} there anew"
            ) from error
        rows += [_reduce(row, task, f"{path}, record {number}") for number, row in enumerate(read, 1)]
    if not rows:
        raise UserError(f"{folder}: its split {split} has no records; put that of {task.repository} there")
    return rows


def _read_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    import datasets

    return datasets.load_from_disk(str(path.parent)).to_list()


def _download(task: Task, splits: tuple[str, ...]) -> Records:
    import datasets

    assert task.repository
    for library in ("datasets", "huggingface_hub"):  # a line for each of many attempts
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(task.repository, task.configuration)
        rows = {split: found[split].select_columns(list(task.fields)).to_list() for split in splits}
    except Exception as error:  # a dozen classes of four libraries, for want of network among others
        raise UserError(
            f"{_needs(task, splits)} could not be downloaded ({described(error)}): fetch it elsewhere, put it"
            f" at FOLDER/{task.name}/{splits[0]}.jsonl or .parquet and pass --data-dir FOLDER"
        ) from error
    return Records(rows, "Hugging Face Hub")


def _reduce(row: Any, task: Task, place: str) -> dict[str, Any]:
    if lacking := [field for field in task.fields if not isinstance(row, dict) or field not in row]:
        raise UserError(
            f"{place}: has no {', '.join(lacking)}; {task.name} needs records of {task.repository}"
        )
    return {field: row[field] for field in task.fields}
