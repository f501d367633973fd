"""What several commands use."""

import contextlib
from collections.abc import Callable, Iterator

DTYPES = ("bfloat16", "float16", "float32")


@contextlib.contextmanager
def progress_bar(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, as the function to call after each write."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None) as bar:
        # The few bytes around the values are not in the total.
        yield lambda count: bar.update(min(count, bar.total - bar.n)) and None
