"""Check a GPU in a few minutes: training is right, and how long a step and its parts take.

    python tools/benchmarks/gpu_check.py [--parts train steps kernels] [--output DIR] [--quick]

It needs this project and what it depends on to be importable (PYTHONPATH), nothing else: no data, no virtual
environment. Three parts, each with a limit in seconds, each of several processes; a line tells as one ends,
and what fails stops nothing else.

train    A small upcycled model of random weights trains for 12 steps: layer by layer, in CUDA graphs, with
         Transformer Engine and without it, all held against the losses of the CPU. It saves while it trains,
         ends at 6, goes on to the same losses, with and without Transformer Engine in turn; it is exported,
         and transformers' loss held against Megatron's.
steps    bench_step.py in every variant that this machine can run, micro-batches of 4 and 8.
kernels  Each kernel of this project against its plain form, then bench_router.py and bench_collect_keys.py.

DIR then holds report.json, report.md (one page), and logs/ with what every process printed. Without a GPU all
sizes are small (--quick), and the page names what could not be run.
"""

import atexit
import contextlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring  # type: ignore[import-not-found]  # beside this file
import random_checkpoint  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIMITS = {"train": 240, "steps": 300, "kernels": 150}  # seconds
OK, FAILED, NOT_RUN = "ok", "failed", "not run"
STEPS, HALF = 12, 6
# The greatest relative difference between two runs' losses, at any step. Both are in bfloat16, whose numbers
# are 0.8% apart; a token that lies between two experts may go to another one on another device.
AGREE = {
    "the CPU's": 1e-2,
    "the plain run's": 1e-2,  # the same device, other kernels
    "the unbroken run's": 2e-3,  # the same kernels, in another process
    "transformers'": 1e-3,  # both in float32, over the same batches
}
GRAPHS = shlex.split("--cuda-graph-impl local --te-rng-tracker --no-check-for-nan-in-loss-and-grad")
TRAIN = shlex.split(
    "--bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --micro-batch-size 4"
    " --global-batch-size 8 --lr 3e-3 --lr-decay-style constant --eval-iters 0 --eval-interval 100"
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
# A step of bench_step.py at a small size: of a GPU's default model, and of the CPU's.
QUICK_STEPS = {
    True: "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4"
    " --num-query-groups 4 --kv-channels 64 --vocab-size 1024 --padded-vocab-size 1024"
    " --rehearse-seq-length 256 --rounds 2",
    False: "--num-layers 2 --vocab-size 256 --rehearse-seq-length 32 --gpus 4 --rounds 1",
}
# Runs in a process that may do without Transformer Engine, and may import Megatron and then wait for a line.
STARTER = """
import runpy, sys
hide, hold, *arguments = sys.argv[1:]
if hide == "hide":
    sys.modules["transformer_engine"] = None
if hold == "hold":
    import megatron.training.arguments
    sys.stdin.readline()
if arguments[0] == "-m":
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = arguments
    sys.path[0] = arguments[0].rpartition("/")[0]
    runpy.run_path(arguments[0], run_name="__main__")
"""
PROBE = """
import importlib, importlib.metadata, json, os, torch
found = {"gpu": torch.cuda.is_available(), "torch": torch.__version__, "cuda": torch.version.cuda, "why": {}}
if found["gpu"]:
    properties = torch.cuda.get_device_properties(0)
    found["hardware"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    found["count"] = torch.cuda.device_count()
    found["cudnn"] = torch.backends.cudnn.version()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
for name in ("transformer_engine.pytorch", "transformers", "triton"):
    try:
        importlib.import_module(name)
    except Exception as error:
        found["why"][name.partition(".")[0]] = f"{type(error).__name__}: {str(error)[:200]}"
for name in ("megatron-core", "transformer-engine", "transformers", "triton", "liger-kernel"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass
class Check:
    """One thing that was checked or measured."""

    name: str
    outcome: str = OK
    seconds: float = 0.0
    note: str = ""  # the reason, where the outcome is not OK
    figures: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass
class Done:
    """A process that has ended."""

    returncode: int | None  # None: it was ended, its limit being over
    output: str
    text: str  # output and errors
    seconds: float
    command: str

    @property
    def losses(self) -> dict[int, float]:
        found = re.findall(r"iteration +(\d+)/ +\d+ \|.*? lm loss: (\S+) \|", self.text)
        return {int(iteration): float(loss) for iteration, loss in found}

    def reason(self) -> str:
        """Why it failed: the last line that says so."""
        if self.returncode is None:
            return f"its limit is over, after {self.seconds:.0f} s"
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        telling = [
            line for line in lines if re.match(r"(\[rank\d\]: )?(error: |[\w.]*(Error|Exception)\b)", line)
        ]
        return f"exit status {self.returncode}: {(telling or lines or ['it printed nothing'])[-1][:300]}"


class Job:
    """A process of ours: ``python ARGUMENTS`` from the project's root, with a time limit."""

    def __init__(
        self,
        part: "Part",
        name: str,
        *arguments: object,
        hide_te: bool = False,
        on_cpu: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.part, self.name = part, name
        self.arguments = [str(argument) for argument in arguments]
        self.hide_te = hide_te
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.environment |= environment or {}
        if on_cpu:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        if on_cpu or not part.machine["gpu"]:
            self.environment.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
        self.process: subprocess.Popen[str] | None = None
        self.held = self.ended = False
        self.logs = [
            part.logs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.{end}" for end in ("out", "err")
        ]

    def start(self, hold: bool = False) -> None:
        """Start it; ``hold``: it imports Megatron and waits, so that others go on meanwhile."""
        self.held = hold
        starter = ["-c", STARTER, "hide" if self.hide_te else "", "hold" if hold else ""]
        with self.logs[0].open("w") as out, self.logs[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *(starter if self.hide_te or hold else []), *self.arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE if hold else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        atexit.register(self.end)  # should this command be ended first

    def run(self, limit: float | None = None) -> Done:
        """Let it run to its end, or to that of its limit or its part's."""
        seconds = min(limit or self.part.left(), self.part.left())
        begin = time.monotonic()
        if seconds <= 0:
            self.end()
            return Done(None, "", "", 0.0, self.command())
        if self.process is None:
            self.start()
        assert self.process
        if self.held and self.process.stdin:
            with contextlib.suppress(OSError):  # it has failed already
                self.process.stdin.write("\n")
                self.process.stdin.close()
        status: int | None
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        self.end()
        output, errors = (log.read_text(errors="replace") for log in self.logs)
        return Done(status, output, output + "\n" + errors, time.monotonic() - begin, self.command())

    def end(self) -> None:
        """End it and all that it started."""
        if self.process and not self.ended:
            self.ended = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def command(self) -> str:
        return shlex.join(["python", *self.arguments])


class Part:
    """One part of the check: what it found, and the time it has."""

    def __init__(
        self, name: str, limit: float, options: Namespace, machine: dict[str, Any], work: Path
    ) -> None:
        self.name, self.limit, self.options, self.machine = name, limit, options, machine
        self.quick: bool = options.quick
        self.work = work / name
        self.work.mkdir(parents=True)
        self.logs = options.output / "logs"
        self.checks: list[Check] = []
        self.missing: list[tuple[str, str]] = []  # what could not be run, and why
        self.begin = time.monotonic()
        self._lock = threading.Lock()

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def add(self, check: Check) -> Check:
        with self._lock:
            self.checks.append(check)
            shown = "; ".join(
                f"{name} {_short(value)}" for name, value in check.figures.items() if _shown(value)
            )
            parts = (
                f"[{self.name}] {check.name}: {check.outcome}",
                f"{check.seconds:.0f} s",
                shown,
                check.note,
            )
            print(", ".join(filter(None, parts)), flush=True)
        return check

    def cannot(self, what: str, why: str) -> None:
        self.missing.append((what, why))

    def result(self) -> dict[str, Any]:
        outcomes = [check.outcome for check in self.checks]
        good = outcomes and all(outcome == OK for outcome in outcomes)
        return {
            "outcome": OK if good else FAILED,
            "seconds": round(time.monotonic() - self.begin, 1),
            "limit": self.limit,
            "checks": [asdict(check) for check in self.checks],
        }


def _shown(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def from_run(done: Done, name: str, **figures: Any) -> Check:
    """A check of a process's end alone."""
    check = Check(name, seconds=done.seconds, command=done.command, figures=figures)
    if done.returncode != 0:
        check.outcome, check.note = FAILED, done.reason()
    return check


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


# --- train


@dataclass(frozen=True)
class Engine:
    """How the layers are built."""

    name: str
    hide_te: bool = False
    flags: tuple[str, ...] = ()


def engines(machine: dict[str, Any]) -> list[Engine]:
    if not machine["te"]:
        return [Engine("without TE")]
    return [Engine("without TE", hide_te=True), Engine("with TE")]


def at_once(jobs: dict[str, Job], workers: int) -> dict[str, Done]:
    """Run jobs, as many at a time as the machine bears; nothing here is timed."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {name: pool.submit(job.run) for name, job in jobs.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:  # this command is to end: its jobs as well, so that the pool can
            pool.shutdown(wait=False, cancel_futures=True)
            for job in jobs.values():
                job.end()
            raise


def train(part: Part) -> None:
    shape, sequence = SHAPES[part.quick]
    dense, moe = part.work / "dense", part.work / "moe"
    random_checkpoint.make_dense(dense, shape)
    random_checkpoint.make_key_stats(part.work / "key_stats", shape)
    convert = ("convert", dense, moe, "--key-stats", part.work / "key_stats", "--num-experts", 8)
    done = Job(part, "convert", "-m", "megatron_router_upcycling.cli", *convert).run()
    if part.add(from_run(done, "convert a dense model")).outcome != OK:
        part.cannot("training", "there is no converted model")
        return
    on_gpu = part.machine["gpu"]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if on_gpu else 1
    kinds = engines(part.machine) if on_gpu else [Engine("CPU")]

    def pretrain(name: str, engine: Engine, *flags: object, on_cpu: bool = False, load: Path = moe) -> Job:
        given = (*length(sequence), "--load", load, *TRAIN, *engine.flags, *flags)
        module = "megatron_router_upcycling.pretrain"
        return Job(part, name, "-m", module, *given, hide_te=engine.hide_te, on_cpu=on_cpu)

    def halves(engine: Engine) -> Path:
        return part.work / f"half {engine.name}"

    asynchronous = ("--async-save", "--async-strategy", "mcore") if on_gpu else ()
    jobs = {"CPU": pretrain("train on the CPU", Engine("CPU", hide_te=part.machine["te"]), on_cpu=True)}
    for engine in kinds:
        if on_gpu:
            jobs[engine.name] = pretrain(f"train {engine.name}", engine)
            jobs[f"{engine.name}, graphs"] = pretrain(f"train {engine.name} in graphs", engine, *GRAPHS)
        save = ("--save", halves(engine), "--save-interval", HALF, "--exit-interval", HALF, *asynchronous)
        jobs[f"{engine.name}, half"] = pretrain(f"half {engine.name}", engine, *save)
    if on_gpu and part.machine["te"]:
        beside = Engine("with TE, --transformer-impl local", flags=("--transformer-impl", "local"))
        kinds_beside = [beside]
        jobs[beside.name] = pretrain("train local beside TE", beside)
    else:
        kinds_beside = []
    ran = at_once(jobs, workers)

    every, first, second = range(1, STEPS + 1), range(1, HALF + 1), range(HALF + 1, STEPS + 1)
    cpu = ran["CPU"]
    check = from_run(cpu, "train on the CPU")
    if check.outcome == OK:
        check.figures["losses"] = list(cpu.losses.values())
        if len(cpu.losses) != STEPS:
            check.outcome, check.note = FAILED, f"{len(cpu.losses)} of {STEPS} steps"
        elif not cpu.losses[STEPS] < 0.95 * cpu.losses[1]:  # five times what runs may differ by
            check.outcome, check.note = FAILED, "it learns too little to tell one run from another"
    part.add(check)
    for engine in kinds + kinds_beside if on_gpu else []:
        plain = ran[engine.name]
        check = from_run(plain, f"train {engine.name}", losses=list(plain.losses.values()))
        compare(check, plain, cpu, "the CPU's", every)
        part.add(check)
        if graphs := ran.get(f"{engine.name}, graphs"):
            built = re.findall(r"built (\d+) cuda graph", graphs.text)
            figures = {"graphs": int(built[-1]) if built else 0, "losses": list(graphs.losses.values())}
            check = from_run(graphs, f"train {engine.name}, whole layers in CUDA graphs", **figures)
            compare(check, graphs, plain, "the plain run's", every)
            if check.outcome == OK and not built:
                check.outcome, check.note = FAILED, "no graph was built"
            part.add(check)
    whole = {engine.name: ran[engine.name] if on_gpu else cpu for engine in kinds}
    how = "while it trains" if on_gpu else "at once"
    for engine in kinds:
        half = ran[f"{engine.name}, half"]
        check = from_run(half, f"save {how} and end at {HALF}, {engine.name}")
        compare(check, half, whole[engine.name], "the unbroken run's", first)
        part.add(check)

    # Each goes on from its own half and from the other's, into a folder of its own.
    jobs = {}
    for before in kinds:
        for after in kinds:
            if ran[f"{before.name}, half"].returncode == 0:
                name = f"from {before.name} on {after.name}"
                save = ("--save", part.work / name, "--save-interval", STEPS)
                jobs[name] = pretrain(name, after, *save, load=halves(before))
    resumed = at_once(jobs, workers)
    for before in kinds:
        for after in kinds:
            name = f"from {before.name} on {after.name}"
            if name not in resumed:
                part.add(Check(f"resume {name}", NOT_RUN, note="there is no half to resume"))
                continue
            check = from_run(resumed[name], f"resume {name}", losses=list(resumed[name].losses.values()))
            against = "the unbroken run's" if before is after else "the plain run's"
            compare(check, resumed[name], whole[after.name], against, second)
            part.add(check)
    ended = [f"from {engine.name} on {engine.name}" for engine in kinds]
    check_exports(part, sequence, {n: kinds[i] for i, n in enumerate(ended) if n in resumed}, workers)
    say_what_training_lacked(part)


def length(sequence: int) -> tuple[object, ...]:
    return ("--seq-length", sequence, "--max-position-embeddings", sequence)


def check_exports(part: Part, sequence: int, runs: dict[str, Engine], workers: int) -> None:
    """Export what was trained, and hold transformers' loss against Megatron's."""
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
                *(part.work / f"hf {name}", "--load", part.work / name, *length(sequence), *flags),
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


# --- steps


def steps(part: Part) -> None:
    on_gpu = part.machine["gpu"]
    if not on_gpu:
        part.cannot("steps in CUDA graphs, utilisation, kernel time", "no GPU")
    if not part.machine["te"]:
        part.cannot("steps with Transformer Engine", part.machine["no_te"])
    jobs: list[tuple[str, Job, Path]] = []
    sizes = (4, 8) if on_gpu or not part.quick else (4,)
    if len(sizes) == 1:
        part.cannot("steps of micro-batch 8", "a small run on the CPU: one size is enough")
    for engine in engines(part.machine) if on_gpu else [Engine("CPU")]:
        for graphs in (False, True) if on_gpu else (False,):
            for size in sizes:
                name = f"{engine.name}{', CUDA graphs' if graphs else ''}, micro-batch {size}"
                output = part.work / f"{name}.json"
                flags: list[object] = ["--output", output, "--micro-batch-size", size]
                flags += ["--ddp-average-in-collective"] if on_gpu else []
                flags += [*GRAPHS, "--routers", "mixture"] if graphs else []
                flags += shlex.split(QUICK_STEPS[on_gpu]) if part.quick else []
                job = Job(part, f"step {name}", HERE / "bench_step.py", *flags, hide_te=engine.hide_te)
                jobs.append((name, job, output))
    for number, (name, job, output) in enumerate(in_turn(jobs, hold=on_gpu)):
        left = len(jobs) - number
        done = job.run(max(60.0, part.left() - 25 * (left - 1)))  # a share for those that are to come
        check = from_run(done, name)
        if check.outcome == OK:
            found = json.loads(output.read_text())
            check.figures = step_figures(found)
        part.add(check)


def in_turn(jobs: list[tuple[str, Job, Path]], hold: bool) -> Iterator[tuple[str, Job, Path]]:
    """One after the other, as they are timed; the next one imports what it needs meanwhile (``hold``)."""
    try:
        for number, entry in enumerate(jobs):
            for _, soon, _ in jobs[number : number + 2] if hold else ():
                if soon.process is None:
                    soon.start(hold=True)
            yield entry
    finally:
        for _, job, _ in jobs:
            job.end()


def step_figures(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a report of bench_step.py, and the report."""
    figures: dict[str, Any] = {}
    for kind, seconds in found["step_seconds"].items():
        profile, used = found["profiles"][kind], found["utilisation"][kind]
        figures |= {
            f"{kind} step ms": seconds * 1e3,
            f"{kind} kernels ms": profile["kernel_ms"],
            f"{kind} launches": profile["launches"],
            f"{kind} gap": profile["gap"],
            f"{kind} utilisation": used,
            f"{kind} routers' share": found["router_share"][kind],
            f"{kind} peak GiB": found["peak_bytes"][kind] / 2**30,
        }
    if found["throughput_ratio"] is not None:
        figures["mixture over stock"] = found["throughput_ratio"]
    return figures | {"report": found}


# --- kernels


def kernels(part: Part) -> None:
    on_gpu = part.machine["gpu"]
    place = "cuda" if on_gpu else "cpu"
    if "triton" in part.machine["why"]:
        part.cannot("kernels against their plain form", part.machine["why"]["triton"])
    else:
        if not on_gpu:
            part.cannot("compiled kernels", "no GPU; Triton's interpreter ran them")
        check_kernels(part, place)
    flags = ["--device", place, "--json"]
    threads = ["--threads", 1] + (["--dtype", "bfloat16"] if on_gpu else [])
    few = ["--rounds", 5, "--tokens", 256, "--hidden-size", 256] if part.quick else []
    done = Job(part, "router", HERE / "bench_router.py", *flags, *threads, *few).run()
    part.add(read_json(from_run(done, "bench_router"), done, router_figures))
    few = ["--num-layers", 1, "--repeats", 3, "--warmup", 1] if part.quick else ["--repeats", 10]
    done = Job(part, "keys", HERE / "bench_collect_keys.py", *flags, *few).run()
    part.add(read_json(from_run(done, "bench_collect_keys"), done, key_figures))


def check_kernels(part: Part, place: str) -> None:
    interpreter = {} if part.machine["gpu"] else {"TRITON_INTERPRET": "1"}
    module = ("-m", "tests.layers.kernel_checks", place)
    done = Job(part, "kernel checks", *module, environment=interpreter).run()
    check = from_run(done, "kernels against their plain form")
    lines = re.findall(r"^(\w+): (.+)$", done.output, re.MULTILINE)
    check.figures = {"equal": sum(said == "ok" for _, said in lines), "of": len(lines)}
    wrong = [f"{name}: {said}" for name, said in lines if said != "ok"]
    if check.outcome == OK and (wrong or not lines):
        check.outcome, check.note = FAILED, "; ".join(wrong)[:1000] or "nothing was checked"
    part.add(check)


def read_json(check: Check, done: Done, figures: Callable[[dict[str, Any]], dict[str, Any]]) -> Check:
    """Add the figures of a benchmark that ends by printing one JSON object."""
    if check.outcome == OK:
        start = re.search(r"^\{", done.output, re.MULTILINE)
        if start is None:
            check.outcome, check.note = FAILED, "it printed no figures"
        else:
            found = json.loads(done.output[start.start() :])
            check.figures = figures(found) | {"report": found}
    return check


def router_figures(found: dict[str, Any]) -> dict[str, Any]:
    result = next(iter(found["results"].values()))
    figures = {f"{name} ms": value * 1e3 for name, value in result["seconds"].items()}
    figures["folded over stock"] = result["ratio"]
    for name, profile in (result.get("kernels") or {}).items():
        figures |= {f"{name} kernels ms": profile["ms"], f"{name} launches": profile["launches"]}
    if "kernel_ratio" in result:
        figures["folded over stock, kernels"] = result["kernel_ratio"]
    return figures


def key_figures(found: dict[str, Any]) -> dict[str, Any]:
    return {"collecting over plain": found["ratio"], "plain s": found["plain_seconds"]}


# --- all of it

VERSIONS = (
    *("python", "torch", "cuda", "cudnn", "nccl", "megatron-core", "transformer-engine", "transformers"),
    *("triton", "liger-kernel"),
)
PARTS: dict[str, Callable[[Part], None]] = {"train": train, "steps": steps, "kernels": kernels}


def probe() -> dict[str, Any]:
    """What this machine is and has, found in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: PyTorch cannot be imported here: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["te"] = found["gpu"] and "transformer_engine" not in found["why"]
    found["no_te"] = (
        "no GPU" if not found["gpu"] else f"cannot be imported ({found['why'].get('transformer_engine')})"
    )
    found.setdefault("hardware", f"{processor()}, {os.cpu_count()} threads (no GPU)")
    found["python"] = platform.python_version()
    return found


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def commit() -> str:
    """The commit of this project, or that it cannot be told."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return said.stdout.strip() if said.returncode == 0 else "unknown"


def page(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    lines = [
        "# GPU check",
        "",
        f"- Hardware: {found['hardware']}",
        f"- Versions: {versions}",
        f"- Commit: {found['commit']}",
        f"- Command: `{found['command']}`",
        f"- Size: {found['size']}; {found['seconds']:.0f} s in all",
        "- Losses agree where they differ by no more than (relative, any step): "
        + ", ".join(f"{limit:.0e} from {name}" for name, limit in found["tolerances"].items()),
    ]
    for name, part in found["parts"].items():
        took = f"{part['seconds']:.0f} of {part['limit']:.0f} s"
        lines += ["", f"## {name}: {part['outcome']} ({took})", ""]
        lines += ["| what | outcome | s | figures |", "|---|---|---|---|"]
        for check in part["checks"]:
            shown = [f"{key} {_short(value)}" for key, value in check["figures"].items() if _shown(value)]
            if losses := check["figures"].get("losses"):
                shown.append(f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
            said = "; ".join([*shown, *filter(None, [check["note"]])]).replace("|", "\\|")
            lines.append(f"| {check['name']} | {check['outcome']} | {check['seconds']:.0f} | {said} |")
        lines += step_parts_table(part["checks"])
    lines += ["", "## Not run", ""]
    lines += [f"- {entry['what']}: {entry['why']}" for entry in found["not_run"]] or ["Everything was run."]
    return "\n".join(lines) + "\n"


def step_parts_table(checks: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of kernels by part of the model, a column for each variant."""
    profiles = {
        f"{check['name']}, {kind}": profile["parts"]
        for check in checks
        for kind, profile in (check["figures"].get("report", {}).get("profiles") or {}).items()
    }
    if not profiles:
        return []
    parts = list(dict.fromkeys(part for found in profiles.values() for part in found))
    lines = ["", "Milliseconds of kernels (on the CPU: of operations) by part of the model:", ""]
    lines += ["| variant | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for name, found in profiles.items():
        cells = (f"{found[part]:.2f}" if part in found else "-" for part in parts)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def run(options: Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    machine = probe()
    options.quick = options.quick or not machine["gpu"]
    print(f"{machine['hardware']}; {'small' if options.quick else 'full'} size", flush=True)
    versions = {name: machine.get(name) for name in VERSIONS}
    found: dict[str, Any] = {
        "hardware": machine["hardware"],
        "versions": versions,
        "commit": options.commit or commit(),
        "command": shlex.join(["python", *sys.argv]),
        "size": "small" if options.quick else "full",
        "tolerances": AGREE,
        "parts": {},
        "not_run": [],
    }
    limits = LIMITS | {name: float(seconds) for name, seconds in options.limit}
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work) as work:
        absent = [name for name in PARTS if name not in options.parts]
        found["not_run"] += [{"what": name, "why": "not asked for (--parts)"} for name in absent]
        for name in (name for name in PARTS if name in options.parts):
            part = Part(name, limits[name], options, machine, Path(work))
            try:
                PARTS[name](part)
            except Exception as error:  # whatever it is, the other parts go on
                part.add(Check("this part's own steps", FAILED, note=f"{type(error).__name__}: {error}"))
            found["parts"][name] = part.result()
            found["not_run"] += [{"what": what, "why": why} for what, why in part.missing]
            found["not_run"] += [
                {"what": check.name, "why": check.note} for check in part.checks if check.outcome == NOT_RUN
            ]
            found["seconds"] = time.monotonic() - begin
            write(options.output, found)  # after each part, should the machine be taken away
            print(
                f"{name}: {found['parts'][name]['outcome']}, {found['parts'][name]['seconds']:.0f} s",
                flush=True,
            )
    return found


def write(folder: Path, found: dict[str, Any]) -> None:
    measuring.write_json(folder / "report.json", found)
    (folder / "report.md").write_text(page(found), encoding="utf-8")


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("bench/gpu_check"))
    parser.add_argument("--quick", action="store_true", help="small sizes; always so where there is no GPU")
    parser.add_argument(
        "--limit",
        nargs=2,
        action="append",
        default=[],
        metavar=("PART", "SECONDS"),
        help=f"of a part (default: {', '.join(f'{name} {seconds}' for name, seconds in LIMITS.items())})",
    )
    parser.add_argument("--commit", help="to name in the report, where git cannot tell")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for checkpoints (default: a temporary folder)"
    )
    options = parser.parse_args()
    options.output = options.output.absolute()
    if unknown := [name for name, _ in options.limit if name not in PARTS]:
        parser.error(f"--limit {unknown[0]}: the parts are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = run(options)
    print(f"wrote {options.output / 'report.md'} and report.json")
    return int(any(part["outcome"] != OK for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
