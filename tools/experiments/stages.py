"""A pipeline of commands that run once each: finished stages are skipped, and interrupted ones resume.

A stage is one command with one output. Its record holds a digest of the command, of its configuration files,
and of the earlier stages whose output it reads. A stage is done if its record says so, the digest has not
changed and the output exists; otherwise it runs again, and so does everything after it. Stages that do not
depend on each other may run in parallel.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_router_upcycling import __version__
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import write_whole
from tools.benchmarks.measuring import commit

LOG_TAIL = 30  # lines of a failed stage's log to show if none begins with "error: "
# Megatron's progress lines, only shown while a command runs and not used as results:
# " iteration       10/     280 | ... | lm loss: 7.525500E+00 | ..."
PROGRESS = re.compile(r"\] iteration +(\d+)/ *(\d+) \|(?:.*?\| lm loss: (\S+) )?")


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline. ``files`` are YAML; ``resumes``: it can continue from its ``output``."""

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    files: tuple[Path, ...] = ()
    after: tuple["Stage", ...] = ()
    resumes: bool = False


class Job:
    """A running stage, with a progress bar on a terminal; ``place``: index of its share of the machine."""

    def __init__(self, stage: Stage, label: str, place: int, record: dict, process: subprocess.Popen[bytes]):
        self.stage, self.label, self.place, self.record, self.process = stage, label, place, record, process
        self.began = time.monotonic()
        bar = "{desc} {n_fmt}/{total_fmt} |{bar:30}| {elapsed}{postfix}"
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(desc=label, leave=False, disable=hidden, bar_format=bar, position=place)

    def show(self, iteration: int, total: int | None, loss: str | None) -> None:
        self.bar.total, self.bar.n = total, iteration
        self.bar.set_postfix_str(f"loss {float(loss):.3f}" if loss else "")


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """``stages`` and all earlier stages that they need, each once and after the stages that it needs."""
    found: dict[Stage, None] = {}
    for stage in stages:
        found |= dict.fromkeys((*in_order(stage.after), stage))
    return list(found)


class Pipeline:
    """Runs stages in ``folder``, with their records under ``stages/`` and their output under ``logs/``."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.jobs: list[Job] = []
        for name in ("stages", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def log(self, stage: Stage) -> Path:
        return self.folder / "logs" / f"{stage.name}.log"

    def digest(self, stage: Stage) -> str:
        """A digest that changes whenever the stage would produce something else than before."""
        configurations = [read_yaml(path) for path in stage.files]
        earlier = [(record["digest"], record["finished"]) for record in map(self.record, stage.after)]
        what = json.dumps([__version__, stage.command, configurations, earlier], sort_keys=True, default=str)
        return hashlib.sha256(what.encode()).hexdigest()

    def record(self, stage: Stage) -> dict:
        """The stage's last run: ``digest``, ``command``, ``seconds``, the ``commit`` at its start, the time
        it ``finished`` (None without success), and why it ``failed``. Empty before the first run."""
        try:
            return json.loads(self._record_file(stage).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}

    def is_done(self, stage: Stage) -> bool:
        record = self.record(stage)
        unchanged = bool(record.get("finished")) and record["digest"] == self.digest(stage)
        return unchanged and stage.output.exists()

    def failure(self, stage: Stage) -> str | None:
        """Why the stage's last run failed, in one line; None if it did not, or if the run is out of date."""
        record = self.record(stage)
        if not record.get("failed") or any(not self.is_done(earlier) for earlier in stage.after):
            return None
        return str(record["failed"]) if record["digest"] == self.digest(stage) else None

    def run(
        self, stages: list[Stage], shares: Sequence[dict[str, str]] = ({},), keep_going: bool = False
    ) -> None:
        """Run the stages that are not done yet, each once the stages before it have succeeded.

        Args:
            stages: must include all stages that they need.
            shares: additions to the environment of the commands, one for each that may run in parallel.
            keep_going: a failed command does not stop the others; only the stages after it are left out.
        """
        with self._alone() as lock:
            try:
                self._run(stages, shares, keep_going, lock)
            finally:
                for job in self.jobs:
                    job.process.send_signal(signal.SIGTERM)
                while self.jobs:
                    job = self.jobs.pop()
                    job.process.wait()
                    job.bar.close()

    def _run(
        self, stages: list[Stage], shares: Sequence[dict[str, str]], keep_going: bool, lock: int
    ) -> None:
        waiting = list(enumerate(stages, start=1))
        free = list(range(len(shares)))
        went_well: dict[str, bool] = {}  # finished stages; False also for stages after a failed one
        while waiting or self.jobs:
            for number, stage in list(waiting):
                before = [went_well.get(earlier.name) for earlier in stage.after]
                label = f"[{number}/{len(stages)}] {stage.title}"
                if False in before:
                    went_well[stage.name] = False
                elif not free or not all(before):
                    continue
                elif self.is_done(stage):
                    tqdm.write(f"{label}: done before")
                    went_well[stage.name] = True
                else:
                    place = free.pop(0)
                    self.jobs.append(self._start(stage, label, place, shares[place], lock))
                waiting.remove((number, stage))
            time.sleep(0.3 if self.jobs else 0)
            for job in list(self.jobs):
                job.show(*self._progress(job.stage))
                if job.process.poll() is not None:
                    self.jobs.remove(job)
                    free = sorted([*free, job.place])
                    went_well[job.stage.name] = self._end(job, keep_going)

    def _start(self, stage: Stage, label: str, place: int, share: dict[str, str], lock: int) -> Job:
        record = self.record(stage)
        began = {"digest": self.digest(stage), "command": shlex.join(stage.command), "commit": commit()}
        if not stage.resumes or record.get("digest") != began["digest"] or record["finished"]:
            if stage.output.is_dir() and not stage.output.is_symlink():
                shutil.rmtree(stage.output)
            else:
                stage.output.unlink(missing_ok=True)
            self.log(stage).unlink(missing_ok=True)
        record = began | {"finished": None, "seconds": None}
        self._write(stage, record)
        tqdm.write(f"{label}\n    {record['command']} > {self.log(stage)}")
        with self.log(stage).open("ab") as log:
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | share,
                pass_fds=(lock,),
            )
        return Job(stage, label, place, record, process)

    def _end(self, job: Job, keep_going: bool) -> bool:
        """Record how a command ended; return whether it succeeded."""
        job.bar.close()
        stage, seconds, status = job.stage, time.monotonic() - job.began, job.process.returncode
        if not status:
            self._write(stage, job.record | {"finished": time.time(), "seconds": round(seconds, 2)})
            iteration, _, loss = self._progress(stage)
            reached = f"{iteration} iterations, loss {float(loss):.3f}, " if loss else ""
            tqdm.write(f"{job.label}: {reached}{seconds:.0f} s")
            return True
        lines = self.log(stage).read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        why = f"its command ended with status {status}" + (f" ({errors[-1]})" if errors else "")
        self._write(stage, job.record | {"failed": f"{why}; the whole log is {self.log(stage)}"})
        tqdm.write("\n".join(errors or lines[-LOG_TAIL:]), file=sys.stderr)
        message = f"{stage.name}: the command ended with status {status}; its whole log is {self.log(stage)}"
        if not keep_going:
            raise UserError(f"{message}; run the same command again to resume")
        tqdm.write(f"failed: {message}", file=sys.stderr)
        return False

    def _progress(self, stage: Stage) -> tuple[int, int | None, str | None]:
        """Iteration, total iterations and loss in the last progress line of the log."""
        with self.log(stage).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            found = PROGRESS.findall(log.read().decode(errors="replace"))
        return (int(found[-1][0]), int(found[-1][1]), found[-1][2] or None) if found else (0, None, None)

    def _record_file(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.json"

    def _write(self, stage: Stage, record: dict) -> None:
        write_whole(self._record_file(stage), json.dumps(record, indent=2) + "\n")

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Hold the folder's lock. Children inherit it, so an orphan that still writes keeps it locked."""
        with (self.folder / "stages" / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"--output {self.folder}: another run is at work there; wait for it or end it"
                raise UserError(message) from None
            yield file.fileno()


def command_line(work: Callable[[], tuple[str, int]]) -> int:
    """Call ``work``, which returns a text and an exit status, print the text, and return the exit status: 2
    after a user's mistake, 130 when stopped (SIGINT or SIGTERM), else that of ``work``."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        text, status = work()
        print(f"\n{text}")
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
