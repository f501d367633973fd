"""What the benchmarks share: time and memory of commands, passes in turns, a folder to work in, commits."""

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

WARM_BYTES = 4 << 30  # what a measured command may fill
# Flags of Megatron that every Qwen has.
QWEN = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope"
    " --untie-embeddings-and-output-weights"
)
CLI = (sys.executable, "-m", "megatron_router_upcycling.cli")


class Usage(NamedTuple):
    """What a command took."""

    seconds: float  # wall time
    processor_seconds: float  # user and system
    peak_mb: float  # resident set


class Commands:
    """Commands that are measured by name, each perhaps several times: the best time, the most memory."""

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
        """A command without the imports that it begins with, beside ``cp -r`` and the ``sync`` after it."""
        best, pairs = self.seconds(), zip(self.taken["cp -r"], self.taken["sync"], strict=True)
        seconds = best[name] - best[imports]
        copied = min(copy.seconds + sync.seconds for copy, sync in pairs)
        return {
            "seconds": seconds,
            "ratio_to_cp": seconds / best["cp -r"],
            "ratio_to_cp_and_sync": seconds / copied,
        }


def measure(*command: Any) -> Usage:
    """Run a command; memory it may fill is touched and given back first.

    In a virtual machine, a page that was not used lately has to be fetched from the host. A command that is
    the first to fill its page cache would be charged for that: up to ten times the time of the copy.
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
    """Call in a process of its own: what a process has used counts in the peak of those it starts."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}: exit status {process.exitcode}")


def all_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def new_bytes(folder: Path) -> int:
    """Bytes of the files that no other folder shares."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    seconds: Callable[[str], float], names: tuple[str, ...], rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Measure things that other work on the machine would disturb: in every round all, in every other one in
    reverse; ``warm_up`` rounds before those do not count."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        for name in names if turn % 2 else reversed(names):
            taken = seconds(name)
            if turn >= 0:
                times[name].append(taken)
    return times


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The rounds' ratios, whose median other work disturbs least."""
    return [a / b for a, b in zip(over, under, strict=True)]


class Parser(argparse.ArgumentParser):
    """Its help is a benchmark's docstring; it says a mistake in one line, as the commands do."""

    def __init__(self, description: str | None, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def add_size_flags(parser: Parser) -> None:
    """The sizes of Qwen1.5-0.5B, and how often to measure."""
    sizes = {"layers": 24, "hidden": 1024, "ffn": 2816, "vocabulary": 151936, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)


def main(
    parser: Parser, run: Callable[[Path, argparse.Namespace], Any], report: Callable[[Any], str]
) -> None:
    """Measure in a folder that is removed afterwards, print the report, and write the figures where asked."""
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as work:
        found = run(Path(work), options)
    print(report(found))
    write_json(options.json, found)


def commit() -> str:
    """The commit of this project that is at work, with ``-dirty`` where files differ, or "unknown"."""
    command, here = "git describe --always --dirty --abbrev=12 --exclude=*", Path(__file__).resolve().parent
    try:
        said = subprocess.run(command.split(), cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() if said.returncode == 0 else "unknown"


def processor() -> str:
    """The processor's name and number of threads, where there is no GPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} threads (no GPU)"


def write_json(path: Path | None, found: Any) -> None:
    if path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
