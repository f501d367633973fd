"""Parts put together in order, by Megatron's own writer."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_router_upcycling.data import parts
from megatron_router_upcycling.errors import UserError, reason


@dataclass
class Counts:
    """What was written to one prefix."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    longest_document: int = 0


@dataclass(frozen=True)
class Job:
    """How the data is put together: files ``prefix``.bin and .idx, and beside them those that are held out.

    The document that would exceed ``max_tokens`` or ``max_bytes``, held-out ones counted in, is the first
    that is left out.
    """

    folder: Path  # of the parts
    prefixes: tuple[Path, ...]  # of training and, where there are any, held-out documents
    dtype: Any
    max_tokens: int | None
    max_bytes: int | None

    def start(self) -> "Writer":
        return Writer(self)


@dataclass
class Writer:
    """Appends parts, in a process of its own: importing Megatron takes seconds that others use."""

    job: Job
    counts: list[Counts] = field(init=False)
    _builders: list[Any] = field(init=False)
    _index_path: Callable[[str], str] = field(init=False)
    _full: bool = False

    def __post_init__(self) -> None:
        with warnings.catch_warnings():  # about GPU libraries that are not there: nothing to do with data
            warnings.simplefilter("ignore")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            from megatron.core.datasets.indexed_dataset import (
                IndexedDatasetBuilder,
                get_bin_path,
                get_idx_path,
            )
        self._index_path = get_idx_path
        self.counts = [Counts() for _ in self.job.prefixes]
        with self._disk():
            self._builders = [
                IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=self.job.dtype)
                for prefix in self.job.prefixes
            ]

    def __call__(self, number: int | None) -> list[Counts]:
        """Append the part of that number; None ends the data.

        Raises:
            UserError: it cannot be written.
        """
        with self._disk():
            if number is not None:
                self._append(number)
            else:
                for prefix, builder in zip(self.job.prefixes, self._builders, strict=True):
                    builder.finalize(self._index_path(str(prefix)))
        return self.counts

    def _append(self, number: int) -> None:
        tokens, table = parts.load(self.job.folder, number)
        start = 0
        for count, size, side in table.tolist():
            if self._full or self._exceeds(count, size):
                self._full = True
                return
            builder, counts = self._builders[side], self.counts[side]
            builder.add_document(tokens[start : start + count], [count])
            start += count
            counts.documents += 1
            counts.tokens += count
            counts.bytes += size
            counts.longest_document = max(counts.longest_document, count)

    def _exceeds(self, count: int, size: int) -> bool:
        job, tokens, text = self.job, count, size
        for counts in self.counts:
            tokens += counts.tokens
            text += counts.bytes
        return (job.max_tokens is not None and tokens > job.max_tokens) or (
            job.max_bytes is not None and text > job.max_bytes
        )

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self.job.prefixes[0].parent
            raise UserError(f"--output: {place} cannot be written ({reason(error)}); make room") from None
