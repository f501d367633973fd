"""gpu_check.py's part "train": a small model trains, is saved, goes on and is exported."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import random_checkpoint  # type: ignore[import-not-found]
from gpu_check_jobs import (  # type: ignore[import-not-found]
    FAILED,
    GRAPHS,
    NOT_RUN,
    OK,
    Check,
    Done,
    Engine,
    Job,
    Part,
    at_once,
    engines,
    from_run,
)

STEPS, HALF = 12, 6
# The greatest relative difference between two runs' losses, at any step. At this learning rate runs in
# bfloat16 and in float32 on one CPU differ by about 1e-3 while they fall by a fifth; at 3e-3 by 9e-2.
AGREE = {
    "the CPU's": 3e-3,
    "the plain run's": 3e-3,  # the same device, other kernels
    "the unbroken run's": 2e-3,  # the same kernels, in another process
    "transformers'": 1e-3,  # both in float32, over the same batches
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
SHAPES = {
    False: (random_checkpoint.Shape(4, 256, 512, 1024, heads=4, groups=4, head_size=64), 256),
    True: (random_checkpoint.Shape(2, 128, 192, 1024, heads=4, groups=4, head_size=32), 64),
}


class Training:
    """Runs of one converted model: their flags, and what they are held against."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.shape, self.sequence = SHAPES[part.quick]
        self.moe = part.work / "moe"
        self.on_gpu: bool = part.machine["gpu"]
        self.workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.on_gpu else 1
        self.engines = engines(part.machine) if self.on_gpu else [Engine("CPU")]
        self.whole: dict[str, Done] = {}  # the unbroken run of each engine

    def convert(self) -> bool:
        """Make the model; whether that went well."""
        dense, statistics = self.part.work / "dense", self.part.work / "key_stats"
        random_checkpoint.make_dense(dense, self.shape)
        random_checkpoint.make_key_stats(statistics, self.shape)
        convert = ("convert", dense, self.moe, "--key-stats", statistics, "--num-experts", 8)
        done = Job(self.part, "convert", "-m", "megatron_router_upcycling.cli", *convert).run()
        return self.part.add(from_run(done, "convert a dense model")).outcome == OK

    def job(
        self, name: str, engine: Engine, *flags: object, on_cpu: bool = False, load: Path | None = None
    ) -> Job:
        given = (*length(self.sequence), "--load", load or self.moe, *TRAIN, *engine.flags, *flags)
        module = "megatron_router_upcycling.pretrain"
        return Job(self.part, name, "-m", module, *given, hide_te=engine.hide_te, on_cpu=on_cpu)

    def half(self, engine: Engine) -> Path:
        """Where a run of this engine that ended half-way was saved."""
        return self.part.work / f"half {engine.name}"


def train(part: Part) -> None:
    training = Training(part)
    if not training.convert():
        part.cannot("training", "there is no converted model")
        return
    kinds = training.engines
    local = Engine("with TE, --transformer-impl local", flags=("--transformer-impl", "local"))
    beside = [local] if training.on_gpu and part.machine["te"] else []
    on_cpu = Engine("CPU", hide_te=part.machine["te"])
    jobs = {"CPU": training.job("train on the CPU", on_cpu, on_cpu=True)}
    for engine in [*kinds, *beside] if training.on_gpu else []:
        jobs[engine.name] = training.job(f"train {engine.name}", engine)
    for engine in kinds if training.on_gpu else []:
        jobs[f"{engine.name}, graphs"] = training.job(f"train {engine.name} in graphs", engine, *GRAPHS)
    asynchronous = ("--async-save", "--async-strategy", "mcore") if training.on_gpu else ()
    for engine in kinds:
        save = ("--save", training.half(engine), "--save-interval", HALF, "--exit-interval", HALF)
        jobs[f"{engine.name}, half"] = training.job(f"half {engine.name}", engine, *save, *asynchronous)
    ran = at_once(jobs, training.workers)

    check_cpu(part, ran["CPU"])
    for engine in [*kinds, *beside] if training.on_gpu else []:
        check_engine(part, engine, ran)
    training.whole = {engine.name: ran[engine.name] if training.on_gpu else ran["CPU"] for engine in kinds}
    how = "while it trains" if training.on_gpu else "at once"
    for engine in kinds:
        half = ran[f"{engine.name}, half"]
        check = from_run(half, f"save {how} and end at {HALF}, {engine.name}")
        compare(check, half, training.whole[engine.name], "the unbroken run's", range(1, HALF + 1))
        part.add(check)
    check_exports(training, go_on(training))
    say_what_training_lacked(part)


def check_cpu(part: Part, cpu: Done) -> None:
    check = from_run(cpu, "train on the CPU")
    if check.outcome == OK:
        check.figures["losses"] = list(cpu.losses.values())
        if len(cpu.losses) != STEPS:
            check.outcome, check.note = FAILED, f"{len(cpu.losses)} of {STEPS} steps"
        elif not cpu.losses[STEPS] < 0.95 * cpu.losses[1]:  # 17 times what runs may differ by
            check.outcome, check.note = FAILED, "it learns too little to tell one run from another"
    part.add(check)


def check_engine(part: Part, engine: Engine, ran: dict[str, Done]) -> None:
    """A run on the GPU against the CPU's, and the same in CUDA graphs against it."""
    every = range(1, STEPS + 1)
    plain, graphs = ran[engine.name], ran.get(f"{engine.name}, graphs")
    check = from_run(plain, f"train {engine.name}", losses=list(plain.losses.values()))
    compare(check, plain, ran["CPU"], "the CPU's", every)
    part.add(check)
    if graphs is None:
        return
    built = re.findall(r"built (\d+) cuda graph", graphs.text)
    figures = {"graphs": int(built[-1]) if built else 0, "losses": list(graphs.losses.values())}
    check = from_run(graphs, f"train {engine.name}, whole layers in CUDA graphs", **figures)
    compare(check, graphs, plain, "the plain run's", every)
    if check.outcome == OK and not built:
        check.outcome, check.note = FAILED, "no graph was built"
    part.add(check)


def go_on(training: Training) -> dict[str, Engine]:
    """Go on from an engine's own half and from the other's; return the folders of one engine alone."""
    part, pairs = training.part, [(a, b) for a in training.engines for b in training.engines]
    jobs = {}
    for before, after in pairs:
        if (training.half(before) / "latest_checkpointed_iteration.txt").is_file():
            name = f"from {before.name} on {after.name}"
            save = ("--save", part.work / name, "--save-interval", STEPS)
            jobs[name] = training.job(name, after, *save, load=training.half(before))
    resumed = at_once(jobs, training.workers)
    ended = {}
    for before, after in pairs:
        name = f"from {before.name} on {after.name}"
        if name not in resumed:
            part.add(Check(f"resume {name}", NOT_RUN, note="there is no half to resume"))
            continue
        check = from_run(resumed[name], f"resume {name}", losses=list(resumed[name].losses.values()))
        against = "the unbroken run's" if before is after else "the plain run's"
        compare(check, resumed[name], training.whole[after.name], against, range(HALF + 1, STEPS + 1))
        part.add(check)
        if before is after:
            ended[name] = after
    return ended


def length(sequence: int) -> tuple[object, ...]:
    return ("--seq-length", sequence, "--max-position-embeddings", sequence)


def check_exports(training: Training, runs: dict[str, Engine]) -> None:
    """Export what was trained, and hold transformers' loss against Megatron's."""
    part, workers = training.part, training.workers
    if "transformers" in part.machine["why"]:
        part.cannot("transformers' loss of an exported model", part.machine["why"]["transformers"])
    export = ("-m", "megatron_router_upcycling.cli", "export-hf")
    exporting = {
        name: Job(part, f"export {name}", *export, part.work / name, part.work / f"hf {name}")
        for name in runs
    }
    exported = at_once(exporting, workers)
    for name, done in exported.items():
        part.add(from_run(done, f"export-hf {name}"))
    if "transformers" in part.machine["why"]:
        return
    # Megatron in float32 as well.
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
        if check.outcome == OK:
            found = json.loads((part.work / f"check {name}.json").read_text())
            check.figures = {"megatron": found["megatron"], "transformers": found["transformers"]}
            worst = abs(found["megatron"] - found["transformers"]) / found["transformers"]
            check.figures["difference"] = worst
            if not worst <= AGREE["transformers'"]:
                check.outcome = FAILED
                check.note = f"they differ by {worst:.2e}, more than {AGREE["transformers'"]:.0e}"
        part.add(check)


def say_what_training_lacked(part: Part) -> None:
    if not part.machine["gpu"]:
        for what in ("training on a GPU over NCCL", "CUDA graphs", "saving while training goes on"):
            part.cannot(what, "no GPU")
    if not part.machine["te"]:
        part.cannot("training with Transformer Engine, and crossing over to it", part.machine["no_te"])


def difference(found: dict[int, float], expected: dict[int, float], steps: Sequence[int]) -> float:
    """The greatest relative difference of losses over ``steps``."""
    absent = [step for step in steps if step not in found or step not in expected]
    if absent:
        raise ValueError(f"no loss of step {absent[0]}")
    return max(abs(found[step] - expected[step]) / abs(expected[step]) for step in steps)


def compare(check: Check, done: Done, expected: Done | None, against: str, steps: Sequence[int]) -> None:
    """Hold a run's losses against another's; ``against`` is of ``AGREE``."""
    if check.outcome != OK:
        return
    if expected is None or expected.returncode != 0:
        check.outcome, check.note = FAILED, f"there are no losses to hold it against: {against}"
        return
    try:
        worst = difference(done.losses, expected.losses, steps)
    except ValueError as error:
        check.outcome, check.note = FAILED, str(error)
        return
    check.figures[f"from {against}"] = worst
    if not worst <= AGREE[against]:
        check.outcome = FAILED
        check.note = f"losses differ from {against} by {worst:.2e}, more than {AGREE[against]:.0e}"
