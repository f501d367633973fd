"""Run processes with time limits and collect their results, for the parts of gpu_check.py."""

import atexit
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OK, FAILED, NOT_RUN = "ok", "failed", "not run"
OVER = "the part's time was over"  # why a check was not run, which a later call may run
EAGER, GRAPHS = ("--cuda-graph-impl", "none"), ("--cuda-graph-impl", "local")
# Start code of a process. It can hide Transformer Engine, or import Megatron and then wait for a line.
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


@dataclass
class Check:
    """One thing that was checked or measured."""

    name: str
    outcome: str = OK
    seconds: float = 0.0
    note: str = ""  # the reason, if the outcome is not OK
    figures: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == OK

    def fail(self, note: str) -> None:
        self.outcome, self.note = FAILED, note


@dataclass
class Done:
    """A process that has ended."""

    returncode: int | None  # None: it was killed at its time limit
    output: str
    text: str  # output and errors
    seconds: float
    command: str

    @property
    def losses(self) -> dict[int, float]:
        found = re.findall(r"iteration +(\d+)/ +\d+ \|.*? lm loss: (\S+) \|", self.text)
        return {int(iteration): float(loss) for iteration, loss in found}

    def reason(self) -> str:
        """Why it failed: the last line with an error."""
        if self.returncode is None:
            return f"its limit is over, after {self.seconds:.0f} s"
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        error = r"(\[rank\d\]: )?(error: |[\w.]*(Error|Exception)\b)"
        telling = [line for line in lines if re.match(error, line)]
        return f"exit status {self.returncode}: {(telling or lines or ['it printed nothing'])[-1][:300]}"


class Job:
    """A process ``python ARGUMENTS`` in the project's root folder, with a time limit."""

    def __init__(
        self, part: "Part", name: str, *arguments: object, hide_te: bool = False, **environment: str
    ) -> None:
        self.part, self.hide_te = part, hide_te
        self.arguments = [str(argument) for argument in arguments]
        self.command = shlex.join(["python", *self.arguments])
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
        if not part.machine["gpu"] or not self.environment.get("CUDA_VISIBLE_DEVICES", "all"):
            self.environment.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
        self.process: subprocess.Popen[str] | None = None
        self.held = self.ended = False
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower())
        self.logs = [part.logs / f"{stem}.{end}" for end in ("out", "err")]

    def start(self, hold: bool = False) -> None:
        """Start it. With ``hold`` it imports Megatron and then waits, while other processes are measured."""
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
        atexit.register(self.end)  # in case this command is stopped first

    def run(self, limit: float | None = None) -> Done:
        """Wait until it ends, or kill it at its time limit or that of its part."""
        seconds = min(limit or self.part.left(), self.part.left())
        begin = time.monotonic()
        if seconds <= 0:
            self.end()
            return Done(None, "", "", 0.0, self.command)
        if self.process is None:
            self.start()
        assert self.process
        if self.held and self.process.stdin:
            with contextlib.suppress(OSError):  # if it has failed already
                self.process.stdin.write("\n")
                self.process.stdin.close()
        status: int | None
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        self.end()
        output, errors = (log.read_text(errors="replace") for log in self.logs)
        return Done(status, output, f"{output}\n{errors}", time.monotonic() - begin, self.command)

    def end(self) -> None:
        """Kill it and all processes that it started."""
        if self.process and not self.ended:
            self.ended = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Part:
    """One part of the check: its results and its time limit."""

    def __init__(
        self, name: str, limit: float, options: Namespace, machine: dict[str, Any], work: Path
    ) -> None:
        self.name, self.limit, self.options, self.machine = name, limit, options, machine
        self.quick: bool = options.quick
        self.work = work / name
        self.work.mkdir(parents=True)
        self.logs = options.output / "logs"
        self.checks: list[Check] = []
        self.missing: list[tuple[str, str]] = []  # checks that could not be run, and why
        self.tell: Callable[[], None] = lambda: None  # called after each check, to write it down
        self.begin = time.monotonic()
        self._lock = threading.Lock()

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def add(self, check: Check) -> Check:
        with self._lock:
            self.checks.append(check)
            said = [f"[{self.name}] {check.name}: {check.outcome}", f"{check.seconds:.0f} s"]
            print(", ".join(filter(None, [*said, "; ".join(shown(check.figures)), check.note])), flush=True)
            self.tell()
        return check

    def cannot(self, what: str, why: str) -> None:
        self.missing.append((what, why))

    def result(self) -> dict[str, Any]:
        failed = not all(check.ok for check in self.checks)
        return {
            "outcome": FAILED if failed else OK if self.checks else NOT_RUN,
            "seconds": round(time.monotonic() - self.begin, 1),
            "limit": self.limit,
            "checks": [asdict(check) for check in self.checks],
            "missing": [{"what": what, "why": why} for what, why in self.missing],
        }


def shown(figures: dict[str, Any]) -> list[str]:
    """The figures that are single values, as short texts."""
    return [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
        if isinstance(value, int | float | str)
    ]


def from_run(done: Done, name: str, **figures: Any) -> Check:
    """A check that only needs the process to succeed."""
    check = Check(name, seconds=done.seconds, command=done.command, figures=figures)
    if done.returncode != 0:
        check.fail(done.reason())
    return check


@dataclass(frozen=True)
class Engine:
    """A way to build the layers."""

    name: str
    hide_te: bool = False
    flags: tuple[str, ...] = ()


def engines(machine: dict[str, Any]) -> list[Engine]:
    """The ways to build layers that work on this machine."""
    if not machine["te"]:
        return [Engine("without TE" if machine["gpu"] else "CPU")]
    return [Engine("without TE", hide_te=True), Engine("with TE")]


def at_once(
    jobs: Mapping[str, Any],
    workers: int,
    tell: Callable[[str, dict[str, Done]], None] = lambda name, ran: None,
) -> dict[str, Done]:
    """Run jobs that are not timed, ``workers`` at a time; ``tell`` of each with the results so far."""
    ran: dict[str, Done] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {name: pool.submit(job.run) for name, job in jobs.items()}
        try:
            for name, future in futures.items():
                ran[name] = future.result()
                tell(name, ran)
            return ran
        except BaseException:  # this command is stopped: end its jobs too, or the pool would wait for them
            pool.shutdown(wait=False, cancel_futures=True)
            for job in jobs.values():
                job.end()
            raise
