"""Python programs that start warm: forked from a process that has imported torch and Megatron already.

Those imports are most of what a short run costs. Otherwise it is as ``python ARGUMENTS``, but that the ranks
of a run share the seed of string hashes. ``launch.torchrun`` is the real thing.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

LAST_WORDS = 5.0  # seconds that ranks have after another one failed

_context = multiprocessing.get_context("forkserver")
IMPORTED = ["megatron.training.training", "megatron.training.argument_utils", "megatron.core.tokenizers.text"]
_context.set_forkserver_preload([*IMPORTED, "torch.utils.tensorboard"])


def start(arguments: list[str], environment: dict[str, str], log: Path) -> ForkServerProcess:
    """Start ``python ARGUMENTS`` (-m MODULE, -c CODE or a file), its output appended to ``log``."""
    with mock.patch.dict(os.environ, environment):  # the server takes its own at the first start
        process = _context.Process(target=_become, args=(arguments, environment, log))
        process.start()
    return process


def wait(processes: list[ForkServerProcess], seconds: float) -> int:
    """Wait for all, and a little for the others of one that fails; return its exit status, or 0."""
    status, deadline = 0, time.monotonic() + seconds
    try:
        while running := [process for process in processes if process.exitcode is None]:
            if not connection.wait([process.sentinel for process in running], deadline - time.monotonic()):
                if status:
                    break  # those that are left wait for the one that failed
                raise TimeoutError(f"after {seconds} seconds")
            failed = [process.exitcode for process in running if process.exitcode]
            if failed and not status:
                status, deadline = failed[0], min(deadline, time.monotonic() + LAST_WORDS)
        return status
    finally:
        for process in processes:
            process.kill()
            process.join()


def _become(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    gc.freeze()  # or looking for garbage would copy the server's memory
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # the platform's again
    try:
        match arguments:
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *rest]:
                sys.argv = ["-c", *rest]
                exec(code, {"__name__": "__main__"})
            case [file, *rest]:
                sys.argv = [file, *rest]
                sys.path.insert(0, str(Path(file).parent))  # as python does
                runpy.run_path(file, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
