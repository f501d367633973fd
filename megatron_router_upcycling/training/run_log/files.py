"""The log files of a run in --save: ``run.jsonl`` (losses) and ``routing.jsonl`` (routers).

One JSON object a line. A run that resumes from a checkpoint first drops the lines of later iterations.

``run.jsonl``: ``{"kind": "train", "iteration", "tokens", "lm_loss", "over", "learning_rate", "grad_norm",
"time"}``, where ``lm_loss`` is the mean over the last ``over`` iterations, and ``{"kind": "held_out",
"iteration", "tokens", "set", "lm_loss"}``. Losses are nats a token, ``time`` seconds since 1970.

``routing.jsonl``: ``{"iteration", "tokens", "layers", ...}``. Each measure of ``measures.summarise`` is a
list over ``layers`` (counted from 0); ``load`` is a list of lists. Auxiliary losses have Megatron's names.
Some lines also have ``rare``, with the measures of ``collector.RARE``.
"""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_router_upcycling.files import write_whole

RUN, ROUTING = "run.jsonl", "routing.jsonl"
ARGUMENTS = "arguments.txt"


def write_arguments(path: Path, arguments: dict[str, Any]) -> None:
    """Write all of Megatron's arguments, one a line; replaces the file of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{name} {'.' * (48 - len(name))} {value}\n" for name, value in arguments.items())
    write_whole(path, "".join(sorted(lines)))


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_plain(line), separators=(",", ":")) + "\n"
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content.encode()) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """The lines in order; empty if there is no file. A line cut short by a crash is skipped."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("iteration"), int):
                lines.append(line)
    return lines


def keep_until(path: Path, iteration: int) -> None:
    """Drop the lines of iterations after ``iteration``, and a line that a crash cut short."""
    if not path.is_file():
        return
    kept = [line for line in read(path) if line["iteration"] <= iteration]
    write_whole(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept))


def _plain(value: Any) -> Any:
    """For JSON: seven significant digits, null for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
