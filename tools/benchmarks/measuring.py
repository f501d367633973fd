"""Helpers of the benchmarks: time and memory of commands, alternating passes, a working folder, commits."""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

WARM_BYTES = 4 << 30  # memory and page cache that a measured command may fill
# Megatron's flags that all Qwen models have in common.
QWEN = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope"
    " --untie-embeddings-and-output-weights"
)
CLI = (sys.executable, "-m", "megatron_router_upcycling.cli")


class Usage(NamedTuple):
    """Time and memory that a command took."""

    seconds: float  # wall time
    processor_seconds: float  # user and system
    peak_mb: float  # resident set


class Commands:
    """Measurements of named commands. For repeated ones the shortest time and the largest memory count."""

    def __init__(self) -> None:
        self.taken: dict[str, list[Usage]] = {}

    def take(self, name: str, *command: Any) -> None:
        self.taken.setdefault(name, []).append(measure(*command))

    def seconds(self) -> dict[str, float]:
        return {name: min(usage.seconds for usage in taken) for name, taken in self.taken.items()}

    def processor_seconds(self) -> dict[str, float]:
        return {name: min(usage.processor_seconds for usage in taken) for name, taken in self.taken.items()}

    def peak_mb(self) -> dict[str, float]:
        return {name: max(usage.peak_mb for usage in taken) for name, taken in self.taken.items()}

    def against_copy(self, name: str, imports: str) -> dict[str, float]:
        """A command's time without its imports, compared with ``cp -r`` and the ``sync`` after it."""
        best, pairs = self.seconds(), zip(self.taken["cp -r"], self.taken["sync"], strict=True)
        seconds = best[name] - best[imports]
        copied = min(copy.seconds + sync.seconds for copy, sync in pairs)
        return {
            "seconds": seconds,
            "ratio_to_cp": seconds / best["cp -r"],
            "ratio_to_cp_and_sync": seconds / copied,
        }


def measure(*command: Any) -> Usage:
    """Run and measure a command, after allocating and freeing the memory that it may fill.

    In a virtual machine, a page that was not used recently has to be fetched from the host. The first command
    to fill the page cache would be charged for that, which may take ten times as long as the copy.
    """
    populate = f"mmap.mmap(-1, {WARM_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", f"import mmap; {populate}"], check=False)
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {process.returncode}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def aside(function: Any, *args: Any) -> None:
    """Call ``function`` in a separate process, since child processes inherit the peak memory of this one."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: exit status {process.exitcode}")


def all_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def new_bytes(folder: Path) -> int:
    """Bytes of the files that have no other hard link."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def now() -> float:
    """The time in seconds, after waiting for the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    seconds: Callable[[str], float], names: tuple[str, ...], rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Measure all ``names`` in each round, in reversed order in every other round, so that other load on the
    machine affects all alike; ``warm_up`` rounds before these are not counted."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        for name in names if turn % 2 else reversed(names):
            taken = seconds(name)
            if turn >= 0:
                times[name].append(taken)
    return times


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each round; their median is robust against other load on the machine."""
    return [a / b for a, b in zip(over, under, strict=True)]


class Parser(argparse.ArgumentParser):
    """A parser whose help is the benchmark's docstring, and whose errors are one line, as in the commands."""

    def __init__(self, description: str | None, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def add_size_flags(parser: Parser) -> None:
    """Add flags for the sizes, with Qwen1.5-0.5B's as defaults, and for the number of measurements."""
    sizes = {"layers": 24, "hidden": 1024, "ffn": 2816, "vocabulary": 151936, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)


def main(
    parser: Parser, run: Callable[[Path, argparse.Namespace], Any], report: Callable[[Any], str]
) -> None:
    """Measure in a folder that is removed afterwards, print the report, and write the figures if asked."""
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as work:
        found = run(Path(work), options)
    print(report(found))
    write_json(options.json, found)


def commit() -> str:
    """The checked-out commit of this project, with ``-dirty`` if files differ from it, or "unknown"."""
    command, here = "git describe --always --dirty --abbrev=12 --exclude=*", Path(__file__).resolve().parent
    try:
        said = subprocess.run(command.split(), cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() if said.returncode == 0 else "unknown"


def processor() -> str:
    """The processor's name and number of threads, as the hardware's description without a GPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} threads (no GPU)"


def write_json(path: Path | None, found: Any) -> None:
    if path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
