"""Flags and progress bars that several commands have."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def add_model_config(command: argparse.ArgumentParser) -> None:
    """The flag that describes a dense model."""
    command.add_argument(
        "--config", metavar="YAML", type=Path, help="the model's Megatron flags, if not in the checkpoint"
    )


@contextlib.contextmanager
def progress_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over bytes, as the function to call after each write."""
    with _bar(name, total, quiet) as bar:
        # Files hold a little more than the values, of which ``total`` is the size.
        yield lambda count: bar.update(min(count, bar.total - bar.n))


@contextlib.contextmanager
def tokens_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int, int, bool], None]]:
    """A progress bar over bytes of text with MB/s, tokens/s and the time left, as the function to call with
    bytes, tokens and whether an earlier run had done them."""
    with _bar(name, total, quiet) as bar:
        tokens, start = 0, time.monotonic()

        def advance(count: int, new_tokens: int, before: bool) -> None:
            nonlocal tokens
            if before and not bar.disable:
                bar.initial += count
            else:
                tokens += new_tokens
                rate = tokens / max(time.monotonic() - start, 1e-3)
                bar.set_postfix_str(f"{rate / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(count)

        yield advance


def _bar(name: str, total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None)
