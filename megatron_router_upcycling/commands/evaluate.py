"""The paper's ten tasks, asked of a Hugging Face model."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import at_least

EXAMPLES = """\
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
that was saved with save_to_disk. Without --data-dir data comes from the Hugging Face Hub or its local cache
(HF_HUB_OFFLINE=1 for the cache alone). Code of data sets is never run.
"""


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a Hugging Face model the paper's ten tasks",
        description="Ask a model in Hugging Face format the paper's ten zero-shot tasks, and print its scores"
        " beside the paper's. Needs the eval extra.",
        epilog=EXAMPLES,
    )
    flag = evaluate.add_argument
    flag("model", metavar="HF_DIR", type=Path, help="the model's folder, tokenizer included")
    flag("--tasks", metavar="LIST", help="tasks or groups, comma between (default: the paper's ten)")
    flag("--limit", metavar="N", type=at_least(1), help="the first N questions of each task only")
    shots = "examples before each question (default: 0)"
    flag("--num-fewshot", metavar="N", type=at_least(0), default=0, help=shots)
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    flag("--batch-size", type=at_least(1), default=8, help="questions at a time (default: 8)")
    dense = "ask this model the same and show its scores beside: the dense one that HF_DIR was made from"
    flag("--dense", metavar="HF_DIR", type=Path, help=dense)
    data = "read the tasks' data from here and download nothing"
    flag("--data-dir", metavar="FOLDER", type=Path, help=data)
    output = "for the results (default: evaluation/NAME of HF_DIR)"
    flag("--output", metavar="DIR", type=Path, help=output)
    flag("--overwrite", action="store_true", help="replace results that --output holds")
    flag("--trust-remote-code", action="store_true", help="run modelling code that HF_DIR brings with it")
    evaluate.set_defaults(run=run)


def options(args: argparse.Namespace) -> Any:
    """What the flags ask for, as ``runner.Options``."""
    from megatron_router_upcycling.evaluation import runner

    names = (field.name for field in dataclasses.fields(runner.Options))
    asked = {name: getattr(args, name) for name in names}
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
        kept = (
            f"{len(last['tasks'])} of {len(asked.tasks)} tasks are in {output}"
            if last
            else "no task was complete"
        )
        raise type(interrupted)(kept) from None
    print(report.markdown(last))
    print(f"saved as {output / report.JSON_NAME} and {output / report.MARKDOWN_NAME}")
