"""``router-upcycle evaluate``: the averages against the paper's own, and whole evaluations of tiny models."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.evaluation import data, paper, report, stdlib_task

# Table 1's averages as printed, in the order of paper.METHODS.
PRINTED = {
    "understanding": ("32.90", "49.40", "25.60", "44.80", "46.30", "50.80"),
    "reasoning": ("37.91", "49.61", "27.17", "44.95", "48.67", "51.86"),
    "knowledge": ("32.55", "35.14", "25.44", "35.35", "33.14", "37.31"),
    "average": ("34.76", "43.78", "26.17", "41.08", "41.98", "45.83"),
}
# Where the ten printed figures give another last digit: 194.65 / 4 and 261.62 / 10.
OTHERWISE = {("reasoning", "mlp"): "48.66", ("average", "switch"): "26.16"}


@pytest.mark.parametrize("method", paper.METHODS)
@pytest.mark.parametrize("group", PRINTED)
def test_averages_are_those_that_the_paper_prints(group: str, method: str) -> None:
    printed = PRINTED[group][paper.METHODS.index(method)]
    average = paper.averages(paper.figures(method, paper.TASKS))[group]
    assert average.complete
    assert report.percent(average.score) == OTHERWISE.get((group, method), printed)


def test_some_scores_give_averages_that_say_so() -> None:
    found = paper.averages({"copa": 60.0, "openbookqa": 20.0, "openbookqa_fact": 41.0, "stdlib": 99.0})
    assert set(found) == {"understanding", "knowledge", "average"}
    assert found["understanding"] == paper.Average(30.5, ("openbookqa", "openbookqa_fact"), 2)
    assert found["understanding"].complete and not found["knowledge"].complete
    assert found["average"] == paper.Average(121 / 3, ("openbookqa", "openbookqa_fact", "copa"), 10)


def test_stdlib_records_are_sound_and_the_same_each_time() -> None:
    made = stdlib_task.records()
    assert made == stdlib_task.records()
    assert (len(made["test"]), len(made["train"])) == (stdlib_task.QUESTIONS, stdlib_task.EXAMPLES)
    answers = [record["answer"] for record in made["test"]]
    for record in made["test"]:
        assert len(set(record["choices"])) == stdlib_task.CHOICES
        assert all(choice == choice.strip() for choice in record["choices"])
    assert all(answers.count(index) > 20 for index in range(stdlib_task.CHOICES))  # no place is favoured
    assert not {json.dumps(r) for r in made["test"]} & {json.dumps(r) for r in made["train"]}
