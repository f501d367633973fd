"""Ask a model the tasks with lm-evaluation-harness, one task after the other.

Everything that can be wrong is found first: options, data, then the model's folder. The harness gets records
and model ready made, so it downloads nothing and runs no code of a data set.
"""

import difflib
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.data.tokenizer import of_folder
from megatron_router_upcycling.errors import UserError, described
from megatron_router_upcycling.evaluation import data, report
from megatron_router_upcycling.evaluation.paper import GROUPS, PAPER_TASKS, TASKS, Task, members
from megatron_router_upcycling.files import sha256, versions

OWN_TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # of the choice of few-shot examples
LEAST_CHARACTERS = 16  # of an answer that is cut for a model that takes few tokens


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
    dense: Path | None = None  # another model that is asked the same, to be shown beside


def parse_tasks(text: str | None) -> tuple[Task, ...]:
    """``--tasks``: names of tasks and of groups with commas between; None is the paper's ten."""
    if text is None:
        return PAPER_TASKS
    names: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in TASKS and word not in GROUPS:
            near = difflib.get_close_matches(word, [*TASKS, *GROUPS], n=1)
            hint = f"did you mean {near[0]}? There" if near else "there"
            raise UserError(f"--tasks: no task {word!r}; {hint} are {', '.join((*TASKS, *GROUPS))}")
        names += members(word) if word in GROUPS else [word]
    if not names:
        raise UserError(f"--tasks: names no task; there are {', '.join((*TASKS, *GROUPS))}")
    return tuple(TASKS[name] for name in dict.fromkeys(names))


def check(model_dir: Path, options: Options) -> None:
    """Find mistakes that need no library to be found."""
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError(f"--data-dir {options.data_dir}: no such folder")
    for folder in filter(None, (model_dir, options.dense)):
        if (folder / beside.ADAPTER).is_file():
            raise UserError(
                f"{folder}: holds an adapter ({beside.ADAPTER}), which transformers applies only where peft"
                " is installed; merge it into its model, or move its files away"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no model in Hugging Face format; it has no config.json")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate needs lm-evaluation-harness: pip install 'megatron-router-upcycling[eval]'")


def evaluate(model_dir: Path, options: Options, done: Callable[[dict[str, Any]], None]) -> None:
    """Evaluate the model in ``model_dir``; after each task ``done`` gets the result so far (report.py)."""
    check(model_dir, options)
    records = data.load(options.tasks, options.data_dir, options.num_fewshot)
    _quiet()
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
            measured = _measure(asked, task, records[task.name], options)
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


def _quiet() -> None:
    """Keep away warnings that the user cannot act on; progress over the questions stays."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load_model(model_dir: Path, options: Options) -> Any:
    """The harness's wrapper of the model and tokenizer in ``model_dir``."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    code = options.trust_remote_code
    try:
        tokenizer = of_folder(model_dir, code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", output_loading_info=True, trust_remote_code=code, local_files_only=True
        )
        model.to(device)
        if not tokenizer.encode("a word", add_special_tokens=False):  # transformers makes up an empty one
            raise ValueError("it holds no tokenizer; export again with --tokenizer DIR, or copy its files")
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, loading[kind])):  # scores would mean nothing
                raise ValueError(
                    f"not the weights of a {type(model).__name__}: {len(keys)} {kind}, {keys[0]}"
                )
    except Exception as error:  # of transformers, tokenizers, safetensors, or the folder's own code
        hint = "" if code else "; code that it brings is run with --trust-remote-code only"
        raise UserError(f"{model_dir}: cannot be loaded on {device} ({described(error)}){hint}") from error
    without_end = tokenizer.eos_token_id is None
    generated = [task.name for task in options.tasks if task.metric == "exact_match"]
    if without_end and generated:
        raise UserError(
            f"--tasks {','.join(generated)}: generated answers end with an end-of-text token, and {model_dir}"
            " has none; leave these tasks out, or name one as eos_token in tokenizer_config.json"
        )
    if without_end:
        tokenizer.pad_token_id = 0  # the harness would add a token that the model does not have
    asked = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        prefix_token_id=0 if without_end else None,  # stands for an empty context, which no task has
    )
    # In bfloat16 the harness would add up an answer's log-likelihood in steps of 0.5 beyond -64.
    asked.softmax_dtype = torch.float32
    return asked


def _measure(language_model: Any, task: Task, records: data.Records, options: Options) -> dict[str, Any]:
    """Scores of one task, in percent."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    if task.harness is None:
        records = fitting(records, task, language_model)
    asked = harness_task(task, records, options.num_fewshot)
    asked.set_fewshot_seed(SEED)
    try:
        found = harness_evaluate(
            language_model, {"tasks": {task.name: asked}}, limit=options.limit, log_samples=True
        )
    except AssertionError:  # of the harness, on an answer; a question it cuts at its beginning
        raise _too_few_tokens(task, language_model) from None
    metrics: dict[str, float] = {}
    for key, value in found["results"][task.name].items():
        name, comma, _ = key.partition(",")  # a metric and the filter of answers, as in acc_stderr,none
        if comma and isinstance(value, int | float):
            metrics[name] = 100 * float(value)
    questions = len(records.splits[task.split])
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    return {
        "title": task.title,
        "group": task.group,
        "metric": task.metric,
        "score": metrics[task.metric],
        "stderr": metrics.get(f"{task.metric}_stderr"),
        "chance": chance(samples) if asked.OUTPUT_TYPE == "multiple_choice" else None,
        "questions": min(questions, options.limit or questions),
        "questions_of": questions,
        "metrics": metrics,
        "by_question": [float(sample[task.metric]) for sample in samples],
        "data": {
            "origin": records.origin,
            "repository": task.repository,
            "configuration": task.configuration,
            "split": task.split,
            "sha256": records.digest(),
        },
        "harness_task_version": asked.VERSION,
    }


def _too_few_tokens(task: Task, language_model: Any) -> UserError:
    return UserError(
        f"--tasks {task.name}: has answers that do not fit the {language_model.max_length} tokens that the"
        " model takes (max_position_embeddings); leave that task out"
    )


def chance(samples: list[dict[str, Any]]) -> float:
    """What answers drawn at random score, in percent: each question's share of one of its choices."""
    return 100 * statistics.mean(1 / len(sample["resps"]) for sample in samples)


def fitting(records: data.Records, task: Task, language_model: Any) -> data.Records:
    """``records`` with all answers cut to as many characters as fit half of what the model takes; says so.

    The other half is for the question, which the harness cuts at its beginning. Questions of which two
    answers become the same are left out.
    """
    room = language_model.max_length // 2
    rows = records.splits[task.split]
    answers = [answer for row in rows for answer in row["choices"]]
    longest = cut = max(map(len, answers))
    while cut and max(len(language_model.tok_encode(answer[:cut])) for answer in answers) > room:
        cut = cut * 3 // 4
    if cut == longest:
        return records
    kept = [row | {"choices": [answer[:cut] for answer in row["choices"]]} for row in rows]
    kept = [row for row in kept if len(set(row["choices"])) == len(row["choices"])]
    if not kept or cut < LEAST_CHARACTERS:
        raise _too_few_tokens(task, language_model)
    print(
        f"{task.name}: answers cut to {cut} characters, {len(kept)} of {len(rows)} questions kept, for the"
        f" model takes {language_model.max_length} tokens",
        flush=True,
    )
    return replace(records, splits=records.splits | {task.split: kept})


def harness_task(task: Task, records: data.Records, num_fewshot: int) -> Any:
    """The harness's task (a ``ConfigurableTask``) over ``records``."""
    import datasets
    import lm_eval.tasks

    splits = {split: datasets.Dataset.from_list(rows) for split, rows in records.splits.items()}
    examples = data.EXAMPLES_SPLIT if num_fewshot else None
    # The harness looks for every split that the task's own file names: those that are not here go.
    changes = {
        "task": task.name,
        "custom_dataset": lambda **_: datasets.DatasetDict(splits),
        "training_split": examples,
        "validation_split": task.split if task.split == "validation" else None,
        "test_split": task.split if task.split == "test" else None,
        "fewshot_split": examples,
        "num_fewshot": num_fewshot,
    }
    folder = Path(lm_eval.tasks.__file__).parent / task.harness if task.harness else OWN_TASKS
    # The harness's 14,000 other tasks are not indexed: that alone takes ten seconds.
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    loaded = manager.load({"group": "evaluation", "task": [changes]})
    return loaded["tasks"][task.name]
