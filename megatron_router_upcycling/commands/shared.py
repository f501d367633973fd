"""What several commands use."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    return number


def add_output_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a command that makes OUT."""
    command.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    command.add_argument("--quiet", action="store_true", help="print errors only")


def add_model_config(command: argparse.ArgumentParser) -> None:
    """The flag that describes a dense model."""
    command.add_argument(
        "--config",
        metavar="YAML",
        type=Path,
        help="the model's Megatron flags, as in model.yaml, where the checkpoint does not describe it",
    )


@contextlib.contextmanager
def progress_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, as the function to call after each write."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None) as bar:

        def advance(count: int) -> None:
            # What surrounds the values in a file is written too, and is not in the total.
            bar.update(min(count, bar.total - bar.n))

        yield advance
