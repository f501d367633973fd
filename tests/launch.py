"""Start real runs for the tests: ranks on Gloo, the command line tool, and what they printed."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[1]
# The work tree of a Megatron-LM checkout, to be tested in place of the installed wheel.
MEGATRON_LM = os.environ.get("MEGATRON_LM")
if MEGATRON_LM:
    assert (Path(MEGATRON_LM) / "megatron/core").is_dir(), f"MEGATRON_LM={MEGATRON_LM}: no Megatron there"
    sys.path.insert(0, MEGATRON_LM)
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), MEGATRON_LM))),
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHON_EXEC": warm.PYTHON,  # with which torchrun starts its ranks
}
TIMEOUT = 240  # seconds; a run takes 2 to 20 on two cores
LAST_WORDS = 5.0  # seconds that ranks have after another one failed


@dataclass(frozen=True)
class Output:
    returncode: int
    text: str  # stdout and stderr together

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> training LM loss, as Megatron logs it (seven digits)."""
        found = re.findall(r"iteration +(\d+)/ +\d+ \|.*? lm loss: (\S+) \|", self.text)
        return {int(iteration): float(loss) for iteration, loss in found}

    @property
    def validation(self) -> float:
        """The last validation LM loss."""
        where = r"validation loss at iteration \d+(?: on validation set)? \| lm loss value: (\S+)"
        return float(re.findall(where, self.ok().text)[-1])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def ok(self) -> "Output":
        assert self.returncode == 0, self.text[-6000:]
        return self


def free_port() -> int:
    """A port below those that systems hand out, so that no other run is given it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _torchrun(ranks: int, module: str, args: tuple[object, ...]) -> list[str]:
    program = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks)
    address = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    return [str(part) for part in (*program, *address, "-m", f"megatron_router_upcycling.{module}", *args)]


def torchrun(ranks: int, module: str, *args: object, **environment: str) -> Output:
    """``torchrun --nproc-per-node RANKS -m megatron_router_upcycling.MODULE ARGS``."""
    return run(*_torchrun(ranks, module, args), timeout=TIMEOUT + 60 * ranks, **environment)


def ranks(number: int, module: str, *args: object, **environment: str) -> Output:
    """The processes that torchrun would start, warm; MODULE is this package's, or a file."""
    program = (module,) if module.endswith(".py") else ("-m", f"megatron_router_upcycling.{module}")
    command = [str(word) for word in (warm.PYTHON, *program, *args)]
    place = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.NamedTemporaryFile() as file:
        try:
            for rank in map(str, range(number)):
                own = ENVIRONMENT | place | {"RANK": rank, "LOCAL_RANK": rank} | environment
                processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
            status = _wait(processes, TIMEOUT + 60 * number)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        text = Path(file.name).read_text()
    assert status is not None, f"takes too long: {text[-6000:]}"
    return Output(status, text)


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> int | None:
    """Wait for all, and a little for the others of one that fails; its exit status, 0, or None: no end."""
    status, deadline = 0, time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return status or None
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not status:
            status, deadline = failed[0], min(deadline, time.monotonic() + LAST_WORDS)
        time.sleep(0.01)
    return status or next((process.returncode for process in processes if process.returncode), 0)


def python(*args: object, **environment: str) -> Output:
    """``python ARGS``, warm."""
    return run(warm.PYTHON, *args, **environment)


def cli(*args: object) -> Output:
    """``router-upcycle ARGS``, warm."""
    return python("-m", "megatron_router_upcycling.cli", *args)


def run(*command: object, timeout: float = TIMEOUT, cwd: Path | None = None, **environment: str) -> Output:
    words, pipe = [str(part) for part in command], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, env=ENVIRONMENT | environment, text=True, timeout=timeout, cwd=cwd, **pipe)
    return Output(done.returncode, done.stdout)


def torchrun_killed(ranks: int, module: str, *args: object, when: str, log: Path) -> None:
    """Start a run and end every process of it by SIGKILL as soon as its output matches ``when``."""
    with log.open("w") as file:
        command = _torchrun(ranks, module, args)
        anew = ENVIRONMENT | {"PYTHON_EXEC": sys.executable}
        process = subprocess.Popen(command, env=anew, stdout=file, stderr=file, start_new_session=True)
        deadline = time.monotonic() + TIMEOUT
        try:
            while not re.search(when, log.read_text()):
                assert process.poll() is None, f"ended before {when!r}:\n{log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"never printed {when!r}:\n{log.read_text()[-4000:]}"
                time.sleep(0.05)
        finally:
            # torchrun gives each worker a session of its own: collect them before the parent goes.
            for pid in (*_children(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def _children(pid: int) -> list[int]:
    lists = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    children = [int(child) for one in lists for child in one]
    return [below for child in children for below in (*_children(child), child)]
