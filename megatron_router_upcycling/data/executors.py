"""datatrove's executors for one machine and for Slurm, which skip finished tasks, told one by one."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger

from megatron_router_upcycling.errors import UserError, reason

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 2
FAILED = "failed"  # a file with the reason, beside the parts


class WorkerLost(UserError):
    """A worker was killed, or a job of Slurm has ended; finished tasks stay."""


class Local(LocalPipelineExecutor):
    """Runs tasks in ``workers`` processes.

    The library's own ``run`` waits for ever where a worker is killed, and begins all tasks.
    """

    def finished(self, ranks: list[int], wanted: Callable[[], bool]) -> Generator[int]:
        """Run the tasks ``ranks`` in order, while more are ``wanted``; yield each when it is done.

        Raises:
            UserError: what a task has raised, or that a worker was killed.
        """
        todo, running = iter(ranks), dict[Future, int]()
        # Forked: this process has imported what they need, and has no threads yet.
        with ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"), _begin) as pool:
            try:
                while True:
                    while (
                        len(running) < 2 * self.workers
                        and wanted()
                        and (rank := next(todo, None)) is not None
                    ):
                        running[pool.submit(self._run_for_rank, rank, 1)] = rank
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        yield running.pop(future)
            except BrokenProcessPool:
                raise WorkerLost(
                    "--workers: one was killed, perhaps since memory ran out; fewer workers, or shorter"
                    " documents (--max-document-bytes), need less; run the same command again to resume"
                ) from None
            finally:
                if running:
                    for child in multiprocessing.active_children():
                        child.kill()


def _begin() -> None:
    """Of a worker: leave Ctrl-C and the terminal to the process that has started it, and end with that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # where there is no such call
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the library logs errors there, and in a file)


class Slurm(SlurmPipelineExecutor):
    """Runs tasks as an array job, and waits for it."""

    def __init__(
        self, work: Path, pipeline: list, tasks: int, workers: int | None, logs: str, options: dict[str, str]
    ) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            raise UserError("--executor slurm: this is a task of an array job; run it outside of one")
        for name in ("partition", "time"):
            if name not in options:
                raise UserError(f"--executor slurm: needs --slurm {name}=..., as sbatch's --{name}")
        python = f"export PATH={Path(sys.executable).parent}:$PATH"
        super().__init__(
            pipeline, tasks, options["time"], options["partition"], workers=workers or -1, logging_dir=logs,
            job_name="prepare-data", qos="", env_command=python, sbatch_args=options,
        )  # fmt: skip
        self.work, self.wave = work, list(range(tasks))

    def finished(self, ranks: list[int], wanted: Callable[[], bool]) -> Generator[int]:
        """As ``Local.finished``; where not all tasks may be wanted, some at a time.

        Raises:
            UserError: Slurm refuses or ends the job, or what a task has raised.
        """
        logger.remove()
        todo = ranks
        (self.work / FAILED).unlink(missing_ok=True)
        while todo and wanted():
            self.wave = todo[: self.workers] if self.workers > 0 else todo
            todo = todo[len(self.wave) :]
            try:
                self.run()
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(f"--executor slurm: sbatch cannot be used ({reason(error)})") from None
            yield from self._waited(set(self.wave))

    def _waited(self, waiting: set[int]) -> Generator[int]:
        while waiting:
            time.sleep(POLL_SECONDS)
            queued = self._queued()  # asked before the files, so that what ended in between is seen
            left = set(self.get_incomplete_ranks(sorted(waiting)))
            yield from sorted(waiting - left)
            if left and not queued:
                with contextlib.suppress(OSError):
                    raise UserError((self.work / FAILED).read_text(encoding="utf-8"))
                raise WorkerLost(
                    f"--executor slurm: job {self.job_id} has ended without {len(left)} of its tasks; see"
                    f" {self.slurm_logs_folder}, and run the same command again to resume"
                )
            waiting = left

    def _queued(self) -> bool:
        asked = subprocess.run(["squeue", "-h", "-j", str(self.job_id)], capture_output=True, text=True)
        return bool(asked.stdout.strip())

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        return super().get_incomplete_ranks(self.wave if ranks is None else ranks, skip_completed)

    def launch_merge_stats(self) -> None:
        """No job for the library's statistics."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except UserError as error:
            (self.work / FAILED).write_text(str(error), encoding="utf-8")
            raise
