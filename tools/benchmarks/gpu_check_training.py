"""gpu_check.py's part "train": train, save, resume and export a small model, and compare losses."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import random_checkpoint
from gpu_check_jobs import EAGER, GRAPHS, NOT_RUN, Check, Done, Engine, Job, Part, at_once, engines, from_run

from megatron_router_upcycling.training.run_log import files

STEPS, HALF = 12, 6
# The largest allowed relative difference between two runs' losses, at any step. At this learning rate, runs
# in bfloat16 and float32 on one CPU differ by about 1e-3, while losses fall by a fifth; at 3e-3 by 9e-2.
AGREE = {
    "the CPU's": 3e-3,
    "the plain run's": 3e-3,  # the same device, other kernels
    "the unbroken run's": 2e-3,  # the same kernels, in another process
    "transformers'": 1e-3,  # both in float32, over the same batches
    "one rank's, bfloat16": 1e-3,
    "one rank's, float32": 1e-5,
}
TRAIN = shlex.split(
    "--bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --micro-batch-size 4"
    " --global-batch-size 8 --lr 5e-4 --lr-decay-style constant --eval-iters 0 --eval-interval 100"
    " --log-interval 1"
    f" --train-iters {STEPS} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    " --moe-grouped-gemm --moe-router-dtype fp32 --moe-router-load-balancing-type aux_loss"
    " --moe-aux-loss-coeff 0.02 --moe-z-loss-coeff 0.001 --moe-token-dispatcher-type alltoall"
    " --ckpt-format torch_dist"
)
EVALUATE = ("--eval-iters", 2, "--eval-interval", 5)  # later flags win
SHAPES = {
    False: (random_checkpoint.Shape(4, 256, 512, 1024, heads=4, groups=4, head_size=64), 256),
    True: (random_checkpoint.Shape(2, 128, 192, 1024, heads=4, groups=4, head_size=32), 64),
}


class Training:
    """Runs of one converted model, and their flags."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.shape, self.sequence = SHAPES[part.quick]
        self.model = part.work.parent / "model"  # which all parts share
        self.moe = self.model / "moe"
        self.on_gpu: bool = part.machine["gpu"]
        self.workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.on_gpu else 1
        self.engines = engines(part.machine)

    def convert(self) -> bool:
        """Make the model if no earlier part has; return whether it is there."""
        if (self.moe / "latest_checkpointed_iteration.txt").is_file():
            return True
        self.model.mkdir(exist_ok=True)
        dense, statistics = random_checkpoint.make(self.model, self.shape)
        convert = ("convert", dense, self.moe, "--key-stats", statistics, "--num-experts", 8)
        done = Job(self.part, "convert", "-m", "megatron_router_upcycling.cli", *convert).run()
        return self.part.add(from_run(done, "convert a dense model")).ok

    def job(
        self,
        name: str,
        engine: Engine,
        *flags: object,
        load: Path | None = None,
        dtype: str = "bfloat16",
        **environment: str,
    ) -> Job:
        given = [*length(self.sequence), "--load", load or self.moe, *TRAIN, *engine.flags, *flags]
        if dtype == "float32":
            given.remove("--bf16")
        module = ("-m", "megatron_router_upcycling.pretrain")
        return Job(self.part, name, *module, *given, hide_te=engine.hide_te, **environment)

    def log(self, engine: Engine | str, suffix: str) -> Path:
        """Where a run from start to end is saved, with its routing statistics."""
        return self.part.work / f"log {engine if isinstance(engine, str) else engine.name}{suffix}"

    def half(self, engine: Engine) -> Path:
        """The folder of this engine's run that stops half-way."""
        return self.part.work / f"half {engine.name}"


def train(part: Part) -> None:
    training = Training(part)
    if not training.convert():
        part.cannot("training", "there is no converted model")
        return
    kinds, on_gpu, te = training.engines, training.on_gpu, part.machine["te"]
    local = Engine("with TE, --transformer-impl local", flags=("--transformer-impl", "local"))
    on_cpu = Engine("CPU", hide_te=te)
    jobs = {"CPU": training.job("train on the CPU", on_cpu, CUDA_VISIBLE_DEVICES="")}
    if on_gpu:
        for engine in [*kinds, local] if te else kinds:
            for suffix, flags in (("", EAGER), (", graphs", GRAPHS)):
                save = ("--save", training.log(engine, suffix), *EVALUATE)
                name = f"{engine.name}{suffix}"
                jobs[name] = training.job(f"train {name}", engine, *flags, *save)
    asynchronous = ("--async-save", "--async-strategy", "mcore") if on_gpu else ()
    for engine in kinds:
        save = ("--save", training.half(engine), "--save-interval", HALF, "--exit-interval", HALF)
        jobs[f"{engine.name}, half"] = training.job(f"half {engine.name}", engine, *save, *asynchronous)
    ran = at_once(jobs, training.workers)

    check_cpu(part, ran["CPU"])
    for name, done in ran.items():
        if name.endswith(", graphs"):
            check_graphs(training, name.removesuffix(", graphs"), ran)
        elif name != "CPU" and not name.endswith(", half"):
            part.add(held(done, f"train {name}", ran["CPU"], "the CPU's"))
    how = "while it trains" if on_gpu else "at once"
    for engine in kinds:
        half, title = ran[f"{engine.name}, half"], f"save {how} and end at {HALF}, {engine.name}"
        part.add(held(half, title, ran[engine.name], "the unbroken run's", range(1, HALF + 1)))
    check_exports(training, resume(training, ran))
    say_what_training_lacked(part)


def check_cpu(part: Part, cpu: Done) -> None:
    check = from_run(cpu, "train on the CPU")
    if check.ok:
        check.figures["losses"] = list(cpu.losses.values())
        if len(cpu.losses) != STEPS:
            check.fail(f"{len(cpu.losses)} of {STEPS} steps")
        elif not cpu.losses[STEPS] < 0.95 * cpu.losses[1]:  # 17 times the allowed difference
            check.fail("it learns too little to tell one run from another")
    part.add(check)


def check_graphs(training: Training, engine: str, ran: dict[str, Done]) -> None:
    """Compare losses and routing statistics of a run in CUDA graphs with those of the same run without."""
    graphs = ran[f"{engine}, graphs"]
    check = held(graphs, f"train {engine}, whole layers in CUDA graphs", ran[engine], "the plain run's")
    built = re.findall(r"built (\d+) cuda graph|100%\S* (\d+)/\d+ \[", graphs.text)
    if check.ok and not built:
        check.fail("no graph was built")
    if check.ok:
        check.figures["graphs"] = int("".join(built[-1]))
        lines = [files.read(training.log(engine, suffix) / files.ROUTING) for suffix in ("", ", graphs")]
        apart = [max(_apart(*pair), default=0.0) for pair in zip(*lines, strict=True)]
        check.figures["routing statistics apart"] = max(apart)
        if len(apart) != STEPS or max(apart) > AGREE["the plain run's"]:
            check.fail(f"routing statistics of {len(apart)} steps are up to {max(apart):.1e} apart")
    training.part.add(check)


def _apart(one: Any, other: Any) -> Iterator[float]:
    """Differences of all numbers in two JSON values, relative to those over 1."""
    if isinstance(one, dict):
        for name in one:
            yield from _apart(one[name], other[name])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            yield from _apart(*pair)
    elif one is not None:
        yield abs(one - other) / max(1.0, abs(one))


def resume(training: Training, ran: dict[str, Done]) -> dict[str, Engine]:
    """Resume each half with each engine; return the folders of runs that kept their engine."""
    part, jobs = training.part, {}
    pairs = {f"from {a.name} on {b.name}": (a, b) for a in training.engines for b in training.engines}
    for name, (before, after) in pairs.items():
        if (training.half(before) / "latest_checkpointed_iteration.txt").is_file():
            save = ("--save", part.work / name, "--save-interval", STEPS)
            jobs[name] = training.job(name, after, *save, load=training.half(before))
        else:
            part.add(Check(f"resume {name}", NOT_RUN, note="there is no half to resume"))
    alone = {}
    for name, done in at_once(jobs, training.workers).items():
        before, after = pairs[name]
        against = "the unbroken run's" if before is after else "the plain run's"
        part.add(held(done, f"resume {name}", ran[after.name], against, range(HALF + 1, STEPS + 1)))
        if before is after:
            alone[name] = after
    return alone


def length(sequence: int) -> tuple[object, ...]:
    return ("--seq-length", sequence, "--max-position-embeddings", sequence)


def check_exports(training: Training, runs: dict[str, Engine]) -> None:
    """Export the trained models, and compare transformers' loss with Megatron's."""
    part, workers = training.part, training.workers
    export = ("-m", "megatron_router_upcycling.cli", "export-hf")
    exporting = {
        name: Job(part, f"export {name}", *export, part.work / name, part.work / f"hf {name}")
        for name in runs
    }
    exported = at_once(exporting, workers)
    for name, done in exported.items():
        part.add(from_run(done, f"export-hf {name}"))
    if why := part.machine["why"].get("transformers"):
        part.cannot("transformers' loss of an exported model", why)
        return
    # Megatron evaluates in float32, as transformers does.
    flags = [flag for flag in TRAIN if flag not in ("--bf16", "--eval-iters", "0")]
    jobs = {}
    for name, engine in runs.items():
        if exported[name].returncode == 0:
            output = part.work / f"check {name}.json"
            jobs[name] = Job(
                *(part, f"check export {name}", "-m", "tools.experiments.check_export"),
                *(part.work / f"hf {name}", "--load", part.work / name, *length(training.sequence), *flags),
                *("--eval-iters", 2, "--output", output),
                hide_te=engine.hide_te,
            )
    for name, done in at_once(jobs, workers).items():
        check = from_run(done, f"transformers' loss of the export {name}")
        if check.ok:
            found = json.loads((part.work / f"check {name}.json").read_text())
            check.figures = {"megatron": found["megatron"], "transformers": found["transformers"]}
            worst = abs(found["megatron"] - found["transformers"]) / found["transformers"]
            check.figures["difference"] = worst
            if not worst <= AGREE["transformers'"]:
                check.fail(f"they differ by {worst:.2e}, more than {AGREE["transformers'"]:.0e}")
        part.add(check)


def say_what_training_lacked(part: Part) -> None:
    if not part.machine["gpu"]:
        for what in ("training on a GPU over NCCL", "CUDA graphs", "saving while training goes on"):
            part.cannot(what, "no GPU")
    if not part.machine["te"]:
        part.cannot("training with Transformer Engine, and crossing over to it", part.machine["no_te"])


def held(
    done: Done, name: str, expected: Done, against: str, steps: Sequence[int] = range(1, STEPS + 1)
) -> Check:
    """A check that a run's losses agree with another's, by their largest relative difference."""
    check = from_run(done, name, losses=list(done.losses.values()))
    absent = [step for step in steps if step not in done.losses or step not in expected.losses]
    if check.ok and expected.returncode != 0:
        check.fail(f"there are no losses to hold it against: {against}")
    elif check.ok and absent:
        check.fail(f"no loss of step {absent[0]}")
    elif check.ok:
        worst = max(abs(done.losses[at] - expected.losses[at]) / abs(expected.losses[at]) for at in steps)
        check.figures[f"from {against}"] = worst
        if not worst <= AGREE[against]:
            check.fail(f"losses differ from {against} by {worst:.2e}, more than {AGREE[against]:.0e}")
    return check
