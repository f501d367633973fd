"""Score a Hugging Face model on the paper's ten tasks.

Score a model in Hugging Face format on the paper's ten zero-shot tasks, and print its scores beside the
paper's. Needs the eval extra.

tasks, by the paper's groups:
  understanding   openbookqa, openbookqa_fact
  reasoning       arc_challenge, arc_easy, hellaswag, winogrande
  knowledge       boolq, copa, nq_open, triviaqa
and stdlib, which is made of Python's own docstrings and needs no data.

examples:
  router-upcycle evaluate hf/moe --device cuda --batch-size 32
  router-upcycle evaluate hf/moe --tasks reasoning,copa --limit 100 --data-dir data
  router-upcycle evaluate hf/moe --tasks stdlib --dense Qwen1.5-0.5B

FOLDER holds TASK/SPLIT.jsonl, TASK/SPLIT.parquet, the Hub's TASK/SPLIT-00000-of-00001.parquet or a data set
that was saved with save_to_disk. Without --data-dir, data comes from the Hugging Face Hub or its local cache
(HF_HUB_OFFLINE=1 for the cache alone). Code of data sets is never run.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import at_least


def add_flags(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add("model", metavar="HF_DIR", type=Path, help="the model's folder, with its tokenizer")
    add("--tasks", metavar="LIST", help="tasks or groups, by commas (default: the ten)")
    add("--limit", metavar="N", type=at_least(1), help="only the first N questions of each task")
    add("--num-fewshot", metavar="N", type=at_least(0), default=0, help="examples before each question")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--batch-size", type=at_least(1), default=8, help="questions at a time")
    add("--dense", metavar="HF_DIR", type=Path, help="the dense model, to score it as well")
    add("--data-dir", metavar="FOLDER", type=Path, help="the tasks' data; download nothing")
    add("--output", metavar="DIR", type=Path, help="(default: evaluation/NAME of HF_DIR)")
    add("--overwrite", action="store_true", help="replace results in --output")
    add("--trust-remote-code", action="store_true", help="run modelling code that HF_DIR brings with it")


def options(args: argparse.Namespace) -> Any:
    """What the flags ask for, as ``runner.Options``."""
    from megatron_router_upcycling.evaluation import runner

    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(runner.Options)}
    return runner.Options(**asked | {"tasks": runner.parse_tasks(args.tasks)})


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.evaluation import report, runner

    asked = options(args)
    output = args.output or Path("evaluation") / args.model.resolve().name
    report.check_output(output, args.overwrite)
    last: dict[str, Any] = {}

    def done(result: dict[str, Any]) -> None:
        report.write(output, result)  # after every task: what was measured survives an interruption
        last.update(result)

    try:
        runner.evaluate(args.model, asked, done)
    except KeyboardInterrupt as interrupted:
        count = len(last.get("tasks", ()))
        raise type(interrupted)(f"{count} of {len(asked.tasks)} tasks are in {output}") from None
    print(report.markdown(last))
    print(f"saved as {output / report.JSON_NAME} and {output / report.MARKDOWN_NAME}")
