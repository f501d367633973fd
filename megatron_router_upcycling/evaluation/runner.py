"""Ask a model the tasks with lm-evaluation-harness, one task after the other.

Mistakes are found before the harness starts: in options, data, then the model's folder. The harness is given
the records and the loaded model, so it downloads nothing and runs no code of a data set.
"""

import hashlib
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.data.tokenizer import of_folder
from megatron_router_upcycling.errors import UserError, described
from megatron_router_upcycling.evaluation import data, report
from megatron_router_upcycling.evaluation.paper import GROUPS, PAPER_TASKS, TASKS, Task, members
from megatron_router_upcycling.files import sha256, versions

OWN_TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # for drawing few-shot examples
LEAST_CHARACTERS = 16  # least length of an answer that is cut for a model with a short context


@dataclass(frozen=True)
class Options:
    """What ``router-upcycle evaluate`` was asked for; see its flags."""

    tasks: tuple[Task, ...]
    limit: int | None
    num_fewshot: int
    device: str
    batch_size: int
    data_dir: Path | None
    trust_remote_code: bool
    dense: Path | None = None  # a second model, evaluated on the same tasks for comparison


def parse_tasks(text: str | None) -> tuple[Task, ...]:
    """Parse ``--tasks``: comma-separated names of tasks and groups; None gives the paper's ten."""
    if text is None:
        return PAPER_TASKS
    names: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        names += members(word) if word in GROUPS else [word]
    if not names or not TASKS.keys() >= set(names):
        raise UserError(f"--tasks {text}: give names of {', '.join((*TASKS, *GROUPS))}, with commas between")
    return tuple(TASKS[name] for name in dict.fromkeys(names))


def check(model_dir: Path, options: Options) -> None:
    """Find mistakes that need no library to be imported."""
    if options.data_dir and not options.data_dir.is_dir():
        raise UserError(f"--data-dir {options.data_dir}: no such folder")
    for folder in filter(None, (model_dir, options.dense)):
        if (folder / beside.ADAPTER).is_file():
            raise UserError(f"{folder}: holds an adapter ({beside.ADAPTER}); merge it, or move it away")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no model in Hugging Face format; it has no config.json")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate needs lm-evaluation-harness: pip install 'megatron-router-upcycling[eval]'")


def evaluate(model_dir: Path, options: Options, done: Callable[[dict[str, Any]], None]) -> None:
    """Evaluate the model in ``model_dir``; ``done`` gets the result so far after each task (report.py)."""
    check(model_dir, options)
    import datasets
    import transformers

    for name in ("lm_eval", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()  # the harness's bar over the questions stays
    transformers.utils.logging.disable_progress_bar()
    records = data.load(options.tasks, options.data_dir, options.num_fewshot)
    language_model = _load_model(model_dir, options)
    asked_of = {"tasks": [task.name for task in options.tasks], "device": str(language_model.device)}
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "model": _described(model_dir, language_model),
        "options": asdict(options) | asked_of | {"seed": SEED},
        "versions": versions("megatron-router-upcycling", "lm_eval", "transformers", "torch", "datasets"),
        "tasks": {},
    }
    models = [(language_model, result)]
    if options.dense:
        dense_model = _load_model(options.dense, options)
        result["dense"] = {"model": _described(options.dense, dense_model), "tasks": {}}
        models.append((dense_model, result["dense"]))
    for task in options.tasks:
        for asked, found in models:
            start = time.monotonic()
            measured = _measure(asked, task, *records[task.name], options)
            found["tasks"][task.name] = measured | {"seconds": round(time.monotonic() - start, 1)}
            report.add_averages(found)
        done(result)


def _described(model_dir: Path, language_model: Any) -> dict[str, Any]:
    model = language_model.model
    return {
        "path": str(model_dir.resolve()),
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "log_likelihoods": str(language_model.softmax_dtype).removeprefix("torch."),
        "config_sha256": sha256(model_dir / "config.json"),
    }


def _load_model(model_dir: Path, options: Options) -> Any:
    """The harness's wrapper of the model and tokenizer in ``model_dir``."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    device = fastest if options.device == "auto" else options.device
    code = options.trust_remote_code
    try:
        tokenizer = of_folder(model_dir, code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", output_loading_info=True, trust_remote_code=code, local_files_only=True
        )
        model.to(device)
        if not tokenizer.encode("a word", add_special_tokens=False):  # transformers made an empty tokenizer
            raise ValueError("it holds no tokenizer; export again with --tokenizer DIR, or copy its files")
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, loading[kind])):  # scores would mean nothing
                name = type(model).__name__
                raise ValueError(f"not the weights of a {name}: {len(keys)} {kind}, {keys[0]}")
    except Exception as error:  # of transformers, tokenizers, safetensors, or the folder's own code
        hint = "" if code else "; code that it brings is run with --trust-remote-code only"
        raise UserError(f"{model_dir}: cannot be loaded on {device} ({described(error)}){hint}") from error
    prefix = None
    if tokenizer.eos_token_id is None:
        if generated := [task.name for task in options.tasks if task.metric == "exact_match"]:
            raise UserError(
                f"--tasks {','.join(generated)}: generated answers end with an end-of-text token, and"
                f" {model_dir} has none; leave these out, or set eos_token in tokenizer_config.json"
            )
        tokenizer.pad_token_id = 0  # else the harness adds a token that the model does not have
        prefix = 0  # the token for an empty context, which no task has
    # In bfloat16, the harness's sum of an answer's log-likelihood would have steps of 0.5 beyond -64.
    settings: dict[str, Any] = {"softmax_dtype": torch.float32, "prefix_token_id": prefix}
    return HFLM(model, tokenizer=tokenizer, batch_size=options.batch_size, **settings)


def _measure(
    language_model: Any, task: Task, splits: data.Splits, origin: str, options: Options
) -> dict[str, Any]:
    """Scores of one task, in percent."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    if task.harness is None:
        splits = splits | {task.split: fitting(splits[task.split], task, language_model)}
    asked = harness_task(task, splits, options.num_fewshot)
    asked.set_fewshot_seed(SEED)
    try:
        found = harness_evaluate(
            language_model, {"tasks": {task.name: asked}}, limit=options.limit, log_samples=True
        )
    except AssertionError:  # the harness's, for a long answer; it truncates long questions from the left
        raise _too_few_tokens(task, language_model) from None
    metrics = {  # a key is the metric and the filter of answers, as in acc_stderr,none
        key.partition(",")[0]: 100 * float(value)
        for key, value in found["results"][task.name].items()
        if "," in key and isinstance(value, int | float)
    }
    questions = len(splits[task.split])
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    # The score of random answers: the mean over questions of 1 / number of choices.
    by_chance = 100 * statistics.mean(1 / len(sample["resps"]) for sample in samples)
    return {
        "title": task.title,
        "group": task.group,
        "metric": task.metric,
        "score": metrics[task.metric],
        "stderr": metrics.get(f"{task.metric}_stderr"),
        "chance": by_chance if asked.OUTPUT_TYPE == "multiple_choice" else None,
        "questions": min(questions, options.limit or questions),
        "questions_of": questions,
        "metrics": metrics,
        "by_question": [float(sample[task.metric]) for sample in samples],
        "data": {
            "origin": origin,
            "repository": task.repository,
            "configuration": task.configuration,
            "split": task.split,
            "sha256": hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest(),
        },
        "harness_task_version": asked.VERSION,
    }


def _too_few_tokens(task: Task, language_model: Any) -> UserError:
    return UserError(
        f"--tasks {task.name}: has answers that do not fit the {language_model.max_length} tokens that the"
        " model takes (max_position_embeddings); leave that task out"
    )


def fitting(rows: list[dict[str, Any]], task: Task, language_model: Any) -> list[dict[str, Any]]:
    """``rows`` with all answers cut to a length that fits half of the model's context; prints a notice.

    The other half is for the question, which the harness truncates from the left. Questions of which two
    answers become equal are left out.
    """
    room = language_model.max_length // 2
    answers = [answer for row in rows for answer in row["choices"]]
    longest = cut = max(map(len, answers))
    while cut and max(len(language_model.tok_encode(answer[:cut])) for answer in answers) > room:
        cut = cut * 3 // 4
    if cut == longest:
        return rows
    kept = [row | {"choices": [answer[:cut] for answer in row["choices"]]} for row in rows]
    kept = [row for row in kept if len(set(row["choices"])) == len(row["choices"])]
    if not kept or cut < LEAST_CHARACTERS:
        raise _too_few_tokens(task, language_model)
    kept_of, limit = f"{len(kept)} of {len(rows)}", language_model.max_length
    print(f"{task.name}: answers cut to {cut} characters, {kept_of} questions kept: the model takes {limit}")
    return kept


def harness_task(task: Task, splits: data.Splits, num_fewshot: int) -> Any:
    """The harness's task (a ``ConfigurableTask``) over these records."""
    import datasets
    import lm_eval.tasks

    sets = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    examples = data.EXAMPLES_SPLIT if num_fewshot else None
    # The harness looks for every split that the task's own file names; unset those without records.
    changes = {
        "task": task.name,
        "custom_dataset": lambda **_: datasets.DatasetDict(sets),
        "training_split": examples,
        "validation_split": task.split if task.split == "validation" else None,
        "test_split": task.split if task.split == "test" else None,
        "fewshot_split": examples,
        "num_fewshot": num_fewshot,
    }
    folder = Path(lm_eval.tasks.__file__).parent / task.harness if task.harness else OWN_TASKS
    # Do not index the harness's 14,000 other tasks, which takes ten seconds.
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    loaded = manager.load({"group": "evaluation", "task": [changes]})
    return loaded["tasks"][task.name]
