"""Show the progress of a training run until killed: one updated line on a terminal, else a line every 30 s.

    python scripts/follow.py LOG FIRST_LINE ARGUMENTS

Reads LOG from line FIRST_LINE on, and the sequence length from ARGUMENTS (RUN/arguments.txt).
"""

import re
import sys
import time
from pathlib import Path

LINE = re.compile(
    r" iteration +(\d+)/ *(\d+) \|.*elapsed time per iteration \(ms\): ([\d.]+) \|"
    r".* global batch size: +(\d+) \| lm loss: (\S+) "
)
LENGTH = re.compile(r"^ *seq_length \.+ (\d+)$", re.MULTILINE)


def progress(log: str, arguments: str) -> str | None:
    """The last of Megatron's progress lines as text; None if there is none."""
    found = LINE.findall(log)
    if not found:
        return None
    iteration, of, milliseconds, batch, loss = found[-1]
    seconds = float(milliseconds) / 1000
    left = (int(of) - int(iteration)) * seconds
    length = LENGTH.search(arguments)
    speed = f", {int(batch) * int(length[1]) / seconds:,.0f} tokens/s" if length else ""
    time_left = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f"step {iteration}/{of}, loss {float(loss):.3f}{speed}, {time_left} left"


def main(log: str, first: str, arguments: str) -> None:
    is_terminal, shown, due = sys.stdout.isatty(), None, 0.0
    start, end = ("\r", "\x1b[K") if is_terminal else ("", "\n")
    while True:
        time.sleep(1)
        if not is_terminal and time.monotonic() < due:
            continue
        text = "".join(Path(log).read_text(errors="replace").splitlines(True)[int(first) - 1 :])
        file = Path(arguments)
        line = progress(text, file.read_text() if file.is_file() else "")
        if line and line != shown:
            print(f"{start}{'':9} {line}", end=end, flush=True)
            shown, due = line, time.monotonic() + 30


if __name__ == "__main__":
    main(*sys.argv[1:])
