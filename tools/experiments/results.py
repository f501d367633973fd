"""The results of a comparison's runs: losses and routing, differences between two runs, and intervals.

Differences are taken seed by seed, because runs with the same seed see the same data in the same order.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.run_log import files

ROUTING = ("load_max_over_mean", "dead_experts", "entropy", "weight_sum", "dropped_fraction")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RunResult:
    """One training run. Losses are nats a token; ``training`` is tokens -> loss; ``routing`` is the mean over
    layers in the last step with routing statistics, ``first_routing`` in the first one. ``answers``: task ->
    score of each question, 1 for a right answer."""

    name: str
    seed: int
    held_out: float
    training: dict[int, float]
    tokens: int
    steps: int
    routing: dict[str, float]
    first_routing: dict[str, float]
    seconds: float
    command: str
    commit: str
    answers: dict[str, list[float]] = field(default_factory=dict)


def read_run(
    name: str, seed: int, folder: Path, record: dict[str, Any], asked: Path | None = None
) -> RunResult:
    """Read the result of the run that saved to ``folder``; ``record`` is its stage's record.

    Args:
        asked: the output folder of ``evaluate`` for the trained model.
    """
    lines = files.read(folder / files.RUN)
    end = held_out(lines)
    if end is None or end["lm_loss"] is None:
        raise UserError(f"{folder / files.RUN}: no finite held-out loss; let eval_iters be larger than 0")
    routing = files.read(folder / files.ROUTING) or [{}]
    tasks = json.loads((asked / "results.json").read_text(encoding="utf-8"))["tasks"] if asked else {}
    return RunResult(
        name=name,
        seed=seed,
        held_out=end["lm_loss"],
        training={line["tokens"]: line["lm_loss"] for line in lines if line["kind"] == "train"},
        tokens=end["tokens"],
        steps=end["iteration"],
        routing=_layer_means(routing[-1]),
        first_routing=_layer_means(routing[0]),
        seconds=record["seconds"],
        command=record["command"],
        commit=record.get("commit", "unknown"),
        answers={task: found["by_question"] for task, found in tasks.items()},
    )


def held_out(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation on held-out text among the lines of a run's log."""
    found = [line for line in lines if line["kind"] == "held_out" and line["set"] == "validation"]
    return found[-1] if found else None


def _layer_means(line: dict[str, Any]) -> dict[str, float]:
    return {key: mean(line[key]) for key in ROUTING if line.get(key)}


def differences(results: Sequence[RunResult], left: str, right: str) -> list[float]:
    """Held-out loss of ``left`` minus that of ``right``, for the seeds that both have finished."""
    return [a.held_out - b.held_out for a, b in _pairs(results, left, right)]


def answer_differences(results: Sequence[RunResult], task: str, left: str, right: str) -> list[float]:
    """Scores of ``left`` minus those of ``right`` for each question, as means over their common seeds."""
    pairs = [(a, b) for a, b in _pairs(results, left, right) if task in a.answers and task in b.answers]
    by_seed = [
        [mine - other for mine, other in zip(a.answers[task], b.answers[task], strict=True)] for a, b in pairs
    ]
    return [mean(question) for question in zip(*by_seed, strict=True)]


def training_differences(
    results: Sequence[RunResult], left: str, right: str
) -> tuple[list[int], list[list[float]]]:
    """Training loss of ``left`` minus that of ``right`` over tokens.

    Returns:
        The numbers of tokens at which all runs have a loss, and for each the differences, one a seed.
    """
    pairs = _pairs(results, left, right)
    if not pairs:
        return [], []
    tokens = sorted(set.intersection(*(set(run.training) for pair in pairs for run in pair)))
    return tokens, [[a.training[at] - b.training[at] for a, b in pairs] for at in tokens]


def _pairs(results: Sequence[RunResult], left: str, right: str) -> list[tuple[RunResult, RunResult]]:
    found = {(result.name, result.seed): result for result in results}
    seeds = sorted({seed for _, seed in found})
    return [(found[left, s], found[right, s]) for s in seeds if (left, s) in found and (right, s) in found]


def crossings(tokens: Sequence[int], found: Sequence[Sequence[float]]) -> list[float]:
    """Where the mean of ``training_differences`` changes its sign, in tokens, by linear interpolation."""
    curve = [(at, mean(values)) for at, values in zip(tokens, found, strict=True) if mean(values) != 0]
    return [
        at - height * (later - at) / (other - height)
        for (at, height), (later, other) in zip(curve, curve[1:], strict=False)
        if (height < 0) != (other < 0)
    ]


@dataclass(frozen=True)
class Interval:
    """The mean of one or more values and its confidence interval; ``ends`` is None for a single value."""

    mean: float
    ends: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool:
        return self.ends is not None and (self.ends[0] > 0 or self.ends[1] < 0)

    def __str__(self) -> str:
        return f"{self:.4f}"

    def __format__(self, form: str) -> str:
        """``form`` is the format of a number without a sign, as in ".4f"."""
        ends = f" [{self.ends[0]:+{form}}, {self.ends[1]:+{form}}]" if self.ends else ""
        return f"{self.mean:+{form}}{ends}"


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of the distribution of ``values``, with this confidence."""
    count, middle = len(values), mean(values)
    if count < 2:
        return Interval(middle, None)
    # Half width: t times the standard error; t is 12.71 at 95% for two values.
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(middle, (middle - half, middle + half))
