"""From text to a dense model to Mixtures-of-Experts, on any machine, in a few minutes.

    make demo        or: .venv/bin/python -m tools.experiments.demo [--output DIR] [--quick]

Prepares a corpus, trains a small dense model on two processes, collects its key statistics, converts it by
Router Upcycling and by vanilla upcycling (a random linear router), goes on training both with two-way
expert parallelism from the same data order, and compares them on held-out text. The first is exported to
Hugging Face format, loaded by transformers, held against Megatron and asked for a few lines.

Every step is a command that is printed before it runs, with its output in DIR/logs. What is done is not done
again; a run that was cut short goes on when the same command is given again.

Ends with DIR/report.md, DIR/results.json and DIR/loss_curves.png.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.errors import Parser, UserError
from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.training import launch, train
from tools.experiments import demo_report
from tools.experiments.foundation import NUM_RANKS, PACKAGE, Foundation, environment, program, torchrun
from tools.experiments.stages import Pipeline, Stage, command_line

CONFIGS = Path("configs/demo")
# Name in the report -> how the converter makes it.
UPCYCLED = {"router upcycling": "mixture", "vanilla upcycling": "linear"}


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
    base = Foundation(output, CONFIGS / "dense.yaml", quick)
    dense, keys = base.dense, base.keys()
    moe_config = ("--config", str(CONFIGS / "moe.yaml"), *base.run_flags)
    moe_files = (CONFIGS / "moe.yaml",)

    def convert(router: str) -> Stage:
        flags = ("--key-stats", str(keys.output)) if router == "mixture" else ("--router", router)
        return Stage(
            f"convert-{router}",
            f"convert the dense model, router: {router}",
            (
                *(program("router-upcycle"), "convert", str(dense.output), str(output / router)),
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
                *(*torchrun("tools.experiments.demo"), *moe_config),
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
            (*torchrun(PACKAGE + "pretrain"), *moe_config, "--load", str(model.output), "--save", str(save)),
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
                *(program("router-upcycle"), "export-hf", str(model.output), str(folder)),
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
                *(
                    program("python"),
                    "-m",
                    "tools.experiments.check_export",
                    str(exported.output),
                    *moe_config,
                ),
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
        corpus=base.corpus,
        dense=dense,
        keys=keys,
        convert=converted,
        evaluate_start={n: evaluate(router, "start", converted[n]) for n, router in UPCYCLED.items()},
        train=trained,
        evaluate_end={n: evaluate(router, "end", trained[n]) for n, router in UPCYCLED.items()},
        export=exported,
        check=check(exported, trained["router upcycling"]),
    )


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
    parser = Parser(description="Train, upcycle and compare a small model, start to end.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to work in (demo)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps: does it all run?")

    def work() -> str:
        args = parser.parse_args(argv)
        stages = plan(args.output, args.quick)
        pipeline = Pipeline(args.output, environment())
        pipeline.run(stages.stages())
        text = report(pipeline, stages, args.output)
        where = f"{args.output}/report.md, results.json, loss_curves.png; logs in {args.output}/logs"
        return f"{text}\n\nSaved: {where}"

    return command_line(work)


def measure(argv: list[str]) -> None:
    """Evaluate as ``argv`` says and write the tokens that each expert of each layer was given."""
    run = launch.prepare([*argv, "--skip-train"], needs_checkpoint=True)
    if run.router is None:
        raise UserError(f"--load {run.args.load}: is a dense model, which has no experts to count tokens for")
    if not run.args.output:
        raise UserError("--output: name the JSON file to write")
    from megatron.core.transformer.moe.router import TopKRouter

    counts: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(run.args.num_experts, dtype=torch.long))

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, TopKRouter):
            _, routing_map = output  # [tokens on this rank, experts], bool
            counts[module.layer_number] += routing_map.sum(dim=0).long().cpu()

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        train.train(run)
    finally:
        hook.remove()

    # Layers and tokens may be on any rank, and tensor-parallel ranks may count the same tokens again: the
    # sum over ranks keeps the proportions, which are what is asked for.
    everyone: list[dict[int, list[int]] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, {layer: c.tolist() for layer, c in counts.items()})
    if torch.distributed.get_rank() == 0:
        layers = sorted({layer for found in everyone if found for layer in found})
        table = [
            [
                sum(column)
                for column in zip(
                    *(found[layer] for found in everyone if found and layer in found), strict=True
                )
            ]
            for layer in layers
        ]
        write_whole(Path(run.args.output), json.dumps({"tokens_per_expert": table}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__main__":
    launch.exit_on_user_error(lambda: measure(sys.argv[1:]))
