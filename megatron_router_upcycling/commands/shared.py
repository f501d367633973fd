"""What several commands use."""

import argparse
import contextlib
from collections.abc import Callable, Iterator

DTYPES = ("bfloat16", "float16", "float32")


def add_output_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a command that makes OUT."""
    command.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    command.add_argument("--quiet", action="store_true", help="print errors only")


@contextlib.contextmanager
def progress_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, as the function to call after each write."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None) as bar:

        def advance(count: int) -> None:
            # What surrounds the values in a file is written too, and is not in the total.
            bar.update(min(count, bar.total - bar.n))

        yield advance
