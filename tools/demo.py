"""From text to a dense model to Mixtures-of-Experts, on any machine, in a few minutes.

    make demo                               or: .venv/bin/python -m tools.demo [--output DIR] [--quick]

Prepares a corpus, trains a small dense model on two processes, collects its key statistics, converts it by
Router Upcycling and by vanilla upcycling (a random linear router), goes on training both with two-way
expert parallelism from the same data order, and compares them on held-out text. The first is exported to
Hugging Face format, loaded by transformers, held against Megatron and asked for a few lines.

Every step is a command that is printed before it runs, with its output in DIR/logs. What is done is not done
again; a run that was cut short goes on when the same command is given again.

Ends with DIR/report.md, DIR/results.json and DIR/loss_curves.png.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_router_upcycling.errors import UserError
from tools import demo_report
from tools.stages import Pipeline, Stage

PACKAGE = "megatron_router_upcycling."
CONFIGS = Path("configs/demo")
NUM_RANKS = 2
# Name in the report -> how the converter makes it.
UPCYCLED = {"router upcycling": "mixture", "vanilla upcycling": "linear"}
# What --quick changes: a model and a corpus just large enough to go through every step.
QUICK_CORPUS = ("--max-bytes", "800000", "--vocab-size", "500", "--held-out-fraction", "0.1")
QUICK_MODEL = ("--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "176", "--kv-channels", "8")
QUICK_RUN = ("--train-iters", "6", "--save-interval", "4", "--eval-iters", "2", "--log-interval", "2")


@dataclass(frozen=True)
class Plan:
    """The stages of the demonstration, by what they are for."""

    corpus: Stage
    dense: Stage
    keys: Stage
    convert: dict[str, Stage]
    evaluate_start: dict[str, Stage]
    train: dict[str, Stage]
    evaluate_end: dict[str, Stage]
    export: Stage
    check: Stage

    def stages(self) -> list[Stage]:
        parts = (self.convert, self.evaluate_start, self.train, self.evaluate_end)
        middle = (stage for part in parts for stage in part.values())
        return [self.corpus, self.dense, self.keys, *middle, self.export, self.check]


def plan(output: Path, quick: bool) -> Plan:
    """The commands of the demonstration that writes to ``output``; runs nothing."""
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())  # shorter to read, and what a user would type
    torchrun = (str(programs / "torchrun"), "--standalone", "--nproc-per-node", str(NUM_RANKS), "-m")
    run = QUICK_RUN if quick else ()
    corpus = Stage(
        "corpus",
        "prepare the corpus: a tokenizer, training and held-out documents",
        (
            str(programs / "python"),
            "tools/prepare_corpus.py",
            *("--output", str(output / "corpus"), "--overwrite", "--quiet", *(QUICK_CORPUS if quick else ())),
        ),
        output / "corpus",
    )
    data = (
        *("--tokenizer-model", str(corpus.output / "tokenizer.model")),
        *("--data-cache-path", str(output / "data_cache")),
        *("--train-data-path", str(corpus.output / "train")),
        *("--valid-data-path", str(corpus.output / "held_out")),
    )
    dense_config = ("--config", str(CONFIGS / "dense.yaml"), *(QUICK_MODEL if quick else ()), *run, *data)
    moe_config = ("--config", str(CONFIGS / "moe.yaml"), *run, *data)
    dense_files = (CONFIGS / "training.yaml", CONFIGS / "dense.yaml")
    moe_files = (CONFIGS / "training.yaml", CONFIGS / "moe.yaml")

    dense = Stage(
        "dense",
        "train the dense model",
        (*torchrun, PACKAGE + "pretrain", *dense_config, "--save", str(output / "dense")),
        output / "dense",
        dense_files,
        (corpus,),
        resumes=True,
    )
    statistics = output / "key_stats.safetensors"
    keys = Stage(
        "keys",
        "collect the key statistics of the dense model",
        (
            *(*torchrun, PACKAGE + "collect_keys", *dense_config),
            *("--load", str(dense.output), "--output", str(statistics), "--quiet"),
        ),
        statistics,
        dense_files,
        (dense,),
    )

    def convert(router: str) -> Stage:
        flags = ("--key-stats", str(statistics)) if router == "mixture" else ("--router", router)
        return Stage(
            f"convert-{router}",
            f"convert the dense model, router: {router}",
            (
                *(str(programs / "router-upcycle"), "convert", str(dense.output), str(output / router)),
                *(*flags, "--num-experts", "8", "--top-k", "2", "--quiet"),
            ),
            output / router,
            after=(dense, keys) if router == "mixture" else (dense,),
        )

    def evaluate(router: str, when: str, model: Stage) -> Stage:
        load = output / f"load-{router}-{when}.json"
        return Stage(
            f"evaluate-{router}-{when}",
            f"evaluate on held-out text, router: {router}, {when}",
            (
                *(*torchrun, "tools.expert_load", *moe_config),
                *("--load", str(model.output), "--output", str(load)),
            ),
            load,
            moe_files,
            (model,),
        )

    def train(router: str, model: Stage) -> Stage:
        save = output / f"{router}-trained"
        return Stage(
            f"train-{router}",
            f"go on training, expert parallel on {NUM_RANKS} ranks, router: {router}",
            (*torchrun, PACKAGE + "pretrain", *moe_config, "--load", str(model.output), "--save", str(save)),
            save,
            moe_files,
            (model,),
            resumes=True,
        )

    def export(model: Stage) -> Stage:
        folder = output / "hf"
        return Stage(
            "export",
            "export to Hugging Face format",
            (
                *(str(programs / "router-upcycle"), "export-hf", str(model.output), str(folder)),
                *("--dtype", "float32", "--quiet"),
            ),
            folder,
            after=(model,),
        )

    def check(exported: Stage, model: Stage) -> Stage:
        found = output / "check.json"
        return Stage(
            "check",
            "load it with transformers, compare with Megatron, write a few lines",
            (
                *(str(programs / "python"), "-m", "tools.check_export", str(exported.output), *moe_config),
                *("--load", str(model.output), "--output", str(found)),
            ),
            found,
            moe_files,
            (exported, model),
        )

    converted = {name: convert(router) for name, router in UPCYCLED.items()}
    trained = {name: train(router, converted[name]) for name, router in UPCYCLED.items()}
    exported = export(trained["router upcycling"])
    return Plan(
        corpus=corpus,
        dense=dense,
        keys=keys,
        convert=converted,
        evaluate_start={n: evaluate(router, "start", converted[n]) for n, router in UPCYCLED.items()},
        train=trained,
        evaluate_end={n: evaluate(router, "end", trained[n]) for n, router in UPCYCLED.items()},
        export=exported,
        check=check(exported, trained["router upcycling"]),
    )


def environment() -> dict[str, str]:
    """The environment of the commands; hides a single GPU, on which two ranks cannot run."""
    changed = dict(os.environ, OMP_NUM_THREADS="1")
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        if 0 < listed.count("GPU ") < NUM_RANKS:
            print(f"One GPU is too few for {NUM_RANKS} ranks: the demonstration runs on the CPU.")
            changed["CUDA_VISIBLE_DEVICES"] = ""
    return changed


def report(pipeline: Pipeline, stages: Plan, output: Path) -> str:
    """Write report.md, results.json and loss_curves.png; return the table."""

    def curve(stage: Stage) -> demo_report.Curve:
        return demo_report.parse_log(pipeline.log(stage).read_text(encoding="utf-8", errors="replace"))

    def evaluated(stage: Stage) -> tuple[float, float]:
        """Held-out loss and imbalance that an evaluation found."""
        loss = curve(stage).held_out
        assert loss is not None, f"no held-out loss in {pipeline.log(stage)}"
        return loss, demo_report.imbalance(json.loads(stage.output.read_text())["tokens_per_expert"])

    dense = curve(stages.dense)
    assert dense.held_out is not None, f"no held-out loss in {pipeline.log(stages.dense)}"
    results = [demo_report.ModelResult("dense", None, dense.held_out, None, None, None, None, None)]
    continued = {}
    for name in UPCYCLED:
        start, load_at_start = evaluated(stages.evaluate_start[name])
        end, load_at_end = evaluated(stages.evaluate_end[name])
        added, named = demo_report.disk_use(stages.convert[name].output, stages.dense.output)
        seconds = pipeline.record(stages.convert[name])["seconds"]
        results.append(
            demo_report.ModelResult(name, start, end, load_at_start, load_at_end, seconds, added, named)
        )
        continued[name] = curve(stages.train[name])

    vocabulary = json.loads((stages.corpus.output / "corpus.json").read_text())["options"]["vocab_size"]
    table = demo_report.table(results)
    note = (
        f"{demo_report.LEGEND}\n"
        f"A guess at random would have a loss of {math.log(vocabulary):.4f}. The dense model was trained for"
        f" {dense.last} steps, each Mixture-of-Experts for {continued[name].last} more on"
        " the same data in the same order."
    )
    checked = json.loads(stages.check.output.read_text(encoding="utf-8"))
    text = f"{table}\n\n{note}\n\n{demo_report.exported(checked)}"
    demo_report.picture(dense, continued, results, output / "loss_curves.png")
    (output / "report.md").write_text(
        f"# Demonstration\n\n{text}\n\n![Loss curves](loss_curves.png)\n", encoding="utf-8"
    )
    found = demo_report.as_json(dense, continued, results) | {"exported": checked}
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, upcycle and compare a small model, start to end.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to work in (demo)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps: does it all run?")
    args = parser.parse_args(argv)

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        stages = plan(args.output, args.quick)
        pipeline = Pipeline(args.output, environment())
        pipeline.run(stages.stages())
        print("\n" + report(pipeline, stages, args.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\nSaved: {args.output}/report.md, results.json, loss_curves.png; logs in {args.output}/logs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
