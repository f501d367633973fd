"""A pipeline of commands, each run once: what is done is passed over, what was cut short goes on.

A stage is one command with one output. Its record holds a digest of the command, of the files that decide
what it does, and of the runs that made what it reads. A stage is done when its record says so, the digest
is still the same and the output is there; otherwise it runs again, and so does everything after it.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_router_upcycling import __version__
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import write_whole

LOG_TAIL = 30  # lines of a failed stage's log to show where none begins with "error: "
# Megatron's progress lines, shown while a command runs; nothing is measured by them:
# " iteration       10/     280 | ... | lm loss: 7.525500E+00 | ..."
PROGRESS = re.compile(r"\] iteration +(\d+)/ *(\d+) \|(?:.*?\| lm loss: (\S+) )?")


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline.

    ``resumes``: the command itself goes on from what its ``output`` folder holds.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    files: tuple[Path, ...] = ()
    after: tuple["Stage", ...] = ()
    resumes: bool = False


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """``stages`` and all that they come after, each once and behind what it reads."""
    found: dict[Stage, None] = {}
    for stage in stages:
        found |= dict.fromkeys((*in_order(stage.after), stage))
    return list(found)


class Pipeline:
    """Runs stages in ``folder``: their records under ``stages/``, what they print under ``logs/``."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        for name in ("stages", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def log(self, stage: Stage) -> Path:
        return self.folder / "logs" / f"{stage.name}.log"

    def digest(self, stage: Stage) -> str:
        """Changes whenever the stage would do something else than before."""
        digest = hashlib.sha256(json.dumps([__version__, *stage.command]).encode())
        for path in stage.files:
            digest.update(_content(path) + b"\0")
        for earlier in stage.after:
            record = self.record(earlier)
            digest.update(f"{record['digest']} {record['finished']}\0".encode())
        return digest.hexdigest()

    def record(self, stage: Stage) -> dict:
        """The last run of the stage: its ``digest``, ``command``, ``seconds`` and when it ``finished``.

        Empty before the first run; ``finished`` is None until the command has ended well.
        """
        try:
            return json.loads(self._record_file(stage).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}

    def is_done(self, stage: Stage) -> bool:
        record = self.record(stage)
        return (
            bool(record.get("finished")) and record["digest"] == self.digest(stage) and stage.output.exists()
        )

    def run(self, stages: list[Stage]) -> None:
        """Run what is not done yet, in order.

        Raises:
            UserError: a command failed, after the end of its log; or another process uses the folder.
        """
        with self._alone() as lock:
            for number, stage in enumerate(stages, start=1):
                print(f"[{number}/{len(stages)}] {stage.title}", flush=True)
                if self.is_done(stage):
                    print("    done before")
                    continue
                self._run(stage, lock)

    def _run(self, stage: Stage, lock: int) -> None:
        digest, record = self.digest(stage), self.record(stage)
        goes_on = stage.resumes and record.get("digest") == digest and not record["finished"]
        if not goes_on:
            _remove(stage.output)
            self.log(stage).unlink(missing_ok=True)
        record = {"digest": digest, "command": shlex.join(stage.command), "finished": None, "seconds": None}
        self._write(stage, record)
        print(f"    {shlex.join(stage.command)} > {self.log(stage)}", flush=True)
        start = time.monotonic()
        status = self._watch(stage, lock)
        if status:
            lines = self.log(stage).read_text(encoding="utf-8", errors="replace").splitlines()
            reason = [line for line in lines if line.startswith("error: ")] or lines[-LOG_TAIL:]
            print(*reason, sep="\n", file=sys.stderr)
            raise UserError(
                f"{stage.name}: the command above ended with status {status}; its whole log is"
                f" {self.log(stage)}; giving the same command again goes on from here"
            )
        seconds = time.monotonic() - start
        self._write(stage, record | {"finished": time.time(), "seconds": round(seconds, 2)})
        iteration, _, loss = self._progress(stage)
        reached = f"{iteration} iterations, loss {float(loss):.3f}, " if loss else ""
        print(f"    {reached}{seconds:.0f} s", flush=True)

    def _watch(self, stage: Stage, lock: int) -> int:
        """Run the command with its output in the log and one moving line on a terminal; return its status."""
        with (
            self.log(stage).open("ab") as log,
            tqdm(desc="   ", leave=False, disable=not sys.stderr.isatty(), bar_format=BAR) as bar,
        ):
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                pass_fds=(lock,),
            )
            try:
                while process.poll() is None:
                    time.sleep(0.3)
                    iteration, total, loss = self._progress(stage)
                    bar.total, bar.n = total, iteration
                    bar.set_postfix_str(f"loss {float(loss):.3f}" if loss else "")
            except BaseException:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
            return process.returncode

    def _progress(self, stage: Stage) -> tuple[int, int | None, str | None]:
        """Iteration, iterations in all and loss in the last progress line of the log."""
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
        """Hold the folder's lock. Children inherit it, so an orphan that still writes keeps it as well."""
        with (self.folder / "stages" / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output {self.folder}: another run is at work there; wait for it or end it"
                ) from None
            yield file.fileno()


def _content(path: Path) -> bytes:
    """What a file says: of a configuration, its entries with those it builds on."""
    if path.suffix == ".yaml":
        return json.dumps(read_yaml(path), sort_keys=True, default=str).encode()
    return path.read_bytes()


def command_line(work: Callable[[], str]) -> int:
    """Do ``work``, print what it returns, and return the exit status: 0, 2 after a user's mistake, 130 when
    it was stopped (SIGINT or SIGTERM)."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        print(f"\n{work()}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


BAR = "{desc} {n_fmt}/{total_fmt} |{bar:30}| {elapsed}{postfix}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
