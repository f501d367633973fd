"""datatrove's executors for one machine and for Slurm: they skip finished tasks and yield each new one."""

import contextlib
import ctypes
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger

from megatron_router_upcycling.errors import UserError, reason

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 2


class WorkerLost(UserError):
    """A worker was killed, or a job of Slurm has ended. Finished tasks are kept."""


class Local(LocalPipelineExecutor):
    """Runs tasks in ``workers`` processes. The library's own ``run`` hangs if one of them is killed."""

    def finished(self, ranks: list[int]) -> Generator[int]:
        """Start the tasks ``ranks`` in order, yield each as it finishes. Closing the generator kills them."""
        # Fork: this process has already imported what the workers need, and has no threads yet.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.workers, context, _begin, (self,)) as pool:
            try:
                running = {pool.submit(_work, rank): rank for rank in ranks}
                for future in as_completed(running):
                    future.result()
                    yield running[future]
            except BrokenProcessPool:
                raise WorkerLost(
                    "--workers: one was killed, perhaps because memory ran out; use fewer workers, or lower"
                    " --max-document-bytes;"
                ) from None
            finally:
                for child in multiprocessing.active_children():
                    child.kill()


_executor: Local | None = None  # set in a worker process


def _begin(executor: Local) -> None:
    """Set up a worker: the parent process handles Ctrl-C and stderr, and the worker dies with its parent."""
    global _executor
    _executor = executor
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the library logs errors there, and in a file)


def _work(rank: int) -> None:
    assert _executor
    _executor._run_for_rank(rank, 1)


class Slurm(SlurmPipelineExecutor):
    """Runs tasks as an array job, and waits for it."""

    def __init__(
        self, pipeline: list, tasks: int, workers: int | None, logs: Path, options: dict[str, str]
    ) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            raise UserError("--executor slurm: this is a task of an array job; run it outside of one")
        if not {"partition", "time"} <= options.keys():
            raise UserError("--executor slurm: needs --slurm partition=... and --slurm time=..., for sbatch")
        python = f"export PATH={Path(sys.executable).parent}:$PATH"
        name = f"{options.get('job-name', 'prepare-data')}-{secrets.token_hex(4)}"  # what squeue looks up
        super().__init__(
            pipeline, tasks, options["time"], options["partition"], workers=workers or -1, job_name=name,
            logging_dir=str(logs), qos="", env_command=python, sbatch_args=options | {"job-name": name},
        )  # fmt: skip
        self.failed = logs / "failed"  # a file with the reason

    def finished(self, ranks: list[int]) -> Generator[int]:
        """As ``Local.finished``."""
        logger.remove()
        self.failed.unlink(missing_ok=True)
        waiting = set(ranks)
        try:
            self.run()
            while waiting:
                time.sleep(POLL_SECONDS)
                queued = self._ask("squeue", "-h")  # before reading the files: a job may end in between
                left = set(self.get_incomplete_ranks(sorted(waiting)))
                done, waiting = waiting - left, left
                yield from sorted(done)
                if waiting and not queued:
                    with contextlib.suppress(OSError):
                        raise UserError(self.failed.read_text(encoding="utf-8"))
                    raise WorkerLost(
                        f"--executor slurm: job {self.job_id} has ended without {len(waiting)} of its tasks;"
                        f" see {self.slurm_logs_folder};"
                    )
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"--executor slurm: Slurm cannot be used ({reason(error)})") from None
        finally:
            if waiting and self.job_id:
                self._ask("scancel")

    def _ask(self, *command: str) -> bool:
        """Whether a Slurm command lists the job (which may be several arrays), or failed this time."""
        words = [*command, f"--name={self.job_name}"]
        asked = subprocess.run(words, capture_output=True, text=True)
        return bool(asked.returncode or asked.stdout.strip())

    def launch_merge_stats(self) -> None:
        """No job for the library's statistics."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except UserError as error:
            self.failed.write_text(str(error), encoding="utf-8")
            raise
