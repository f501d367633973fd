"""The paper's ten zero-shot tasks, its scores for them (arXiv 2509.00679, table 1), and its averages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

METHODS = ("scratch", "vanilla", "switch", "locmoe", "mlp", "router upcycling")
GROUPS = ("understanding", "reasoning", "knowledge")


@dataclass(frozen=True)
class Task:
    """A task: the harness's task and metric, the location of its records, and the paper's scores."""

    name: str  # the name in the harness, in ``--tasks`` and of the folder in ``--data-dir``
    title: str  # the name in the paper
    group: str | None  # one of ``GROUPS``; None for a task that is not in the paper
    # The metric that is reported: ``acc_norm`` if answers differ in length (it divides an answer's
    # log-likelihood by its number of characters, so that short ones do not win); ``acc`` if not, or if the
    # harness scores the same words after each choice (WinoGrande); ``exact_match`` for generated answers.
    metric: str
    harness: str | None  # the folder in the harness that holds the task; None for a task file of this package
    repository: str | None  # the data set on the Hugging Face Hub; None for one that is made here
    configuration: str | None
    split: str  # the split that is evaluated
    fields: tuple[str, ...]  # required fields of a record
    figures: tuple[float, ...] = ()  # the paper's scores, in percent, in the order of ``METHODS``


_OPENBOOK = ("question_stem", "choices", "answerKey")
_ARC = ("question", "choices", "answerKey")

# fmt: off
PAPER_TASKS = (
    Task("openbookqa", "OpenbookQA", "understanding", "acc_norm", "openbookqa",
         "allenai/openbookqa", "main", "test", _OPENBOOK,
         (31.4, 40.8, 27.6, 38.2, 37.6, 42.6)),
    Task("openbookqa_fact", "OpenbookQA-fact", "understanding", "acc_norm", None,
         "allenai/openbookqa", "additional", "test", (*_OPENBOOK, "fact1"),
         (34.4, 58.0, 23.6, 51.4, 55.0, 59.0)),
    Task("arc_challenge", "ARC-C", "reasoning", "acc_norm", "arc",
         "allenai/ai2_arc", "ARC-Challenge", "test", _ARC,
         (27.12, 39.66, 14.58, 29.15, 34.92, 42.37)),
    Task("arc_easy", "ARC-E", "reasoning", "acc_norm", "arc",
         "allenai/ai2_arc", "ARC-Easy", "test", _ARC,
         (30.51, 52.73, 20.63, 45.68, 51.15, 58.02)),
    Task("hellaswag", "HellaSwag", "reasoning", "acc_norm", "hellaswag",
         "Rowan/hellaswag", None, "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
         (41.45, 49.36, 25.24, 48.83, 49.70, 50.12)),
    Task("winogrande", "WinoGrande", "reasoning", "acc", "winogrande",
         "allenai/winogrande", "winogrande_xl", "validation", ("sentence", "option1", "option2", "answer"),
         (52.57, 56.67, 48.22, 56.12, 58.88, 56.91)),
    Task("boolq", "BoolQ", "knowledge", "acc", "super_glue/boolq",
         "aps/super_glue", "boolq", "validation", ("passage", "question", "label"),
         (48.13, 49.88, 47.09, 54.19, 41.44, 55.84)),
    Task("copa", "COPA", "knowledge", "acc", "super_glue/copa",
         "aps/super_glue", "copa", "validation", ("premise", "question", "choice1", "choice2", "label"),
         (60, 62, 49, 61, 63, 64)),
    Task("nq_open", "NQ", "knowledge", "exact_match", "nq_open",
         "google-research-datasets/nq_open", None, "validation", ("question", "answer"),
         (4.32, 4.85, 0.42, 4.04, 3.96, 5.15)),
    Task("triviaqa", "TriviaQA", "knowledge", "exact_match", "triviaqa",
         "mandarjoshi/trivia_qa", "rc.nocontext", "validation", ("question", "answer"),
         (17.74, 23.82, 5.24, 22.16, 24.17, 24.25)),
)
STDLIB = Task("stdlib", "stdlib (not in the paper)", None, "acc_norm", None,
              None, None, "test", ("context", "choices", "answer"))
# fmt: on
TASKS = {task.name: task for task in (*PAPER_TASKS, STDLIB)}


def members(group: str) -> tuple[str, ...]:
    """The names of a group's tasks, or of all ten for ``average``."""
    return tuple(task.name for task in PAPER_TASKS if group in (task.group, "average"))


def averages(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The paper's averages: one for each group, then ``average``, each the plain mean over those of the
    paper's tasks that have a score, with their names and the full number."""
    result = {}
    for group in (*GROUPS, "average"):
        names = members(group)
        if there := [name for name in names if name in scores]:
            score = mean(scores[name] for name in there)
            counts = {"of": len(names), "complete": len(there) == len(names)}
            result[group] = {"score": score, "tasks": there, **counts}
    return result


def figures(method: str, names: Iterable[str]) -> dict[str, float]:
    """The paper's scores of ``method`` on the tasks ``names``, in percent."""
    column = METHODS.index(method)
    return {name: TASKS[name].figures[column] for name in names if TASKS[name].figures}
