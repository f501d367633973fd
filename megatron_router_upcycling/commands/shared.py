"""Flags and progress bars that several commands have."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
PATHS: dict[str, Any] = {"type": Path, "nargs": "+", "default": ()}  # of a flag that takes one path or more


def add_model_config(command: argparse.ArgumentParser) -> None:
    """The flag that describes a dense model."""
    command.add_argument(
        "--config", metavar="YAML", type=Path, help="the model's Megatron flags, if not in the checkpoint"
    )


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    return number


@contextlib.contextmanager
def progress_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over bytes, as the function to call after each write."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None) as bar:
        # Files hold a little more than the values, of which ``total`` is the size.
        yield lambda count: bar.update(min(count, bar.total - bar.n))
