"""data/workers.py: tasks go to real processes, and what goes wrong there is told here."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from megatron_router_upcycling.data.workers import Child, WorkerLost, spread
from megatron_router_upcycling.errors import UserError


@dataclass(frozen=True)
class Double:
    """Doubles numbers; below zero it makes a mistake, fails or is killed."""

    def start(self) -> Callable[[int], int]:
        return double


def double(number: int) -> int:
    if number == -1:
        raise UserError("--number -1: is negative")
    if number == -2:
        raise ValueError("two below zero")
    if number == -3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_every_task_is_answered_until_no_more_are_wanted():
    with Child(Double()) as one, Child(Double()) as other:
        assert sorted(spread([one, other], range(50), lambda: True)) == [(n, 2 * n) for n in range(50)]
        answered = []
        for task, _ in spread([one, other], range(50), lambda: len(answered) < 10):
            answered.append(task)
        assert 10 <= len(answered) <= 12


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (-1, UserError, "--number -1: is negative"),
        (-2, RuntimeError, "ValueError: two below zero"),
        (-3, WorkerLost, "one ended by signal 9"),
    ],
)
def test_why_a_process_ended_is_told(task, kind, message):
    with Child(Double()) as child, pytest.raises(kind, match=message):
        list(spread([child], [1, task], lambda: True))
    with Child(Double()) as child:
        for earlier in (1, 2, task):
            child.send(earlier)
        child._process.join()
        with pytest.raises(kind, match=message):  # also where the answers before were not asked for
            child.send(3)
