"""Parts put together in order, by Megatron's own writer."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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
    max_tokens: int | None
    max_bytes: int | None

    def start(self) -> "Writer":
        return Writer(self)


class Writer:
    """Appends parts, in a process of its own: importing Megatron takes seconds that others use."""

    def __init__(self, job: Job) -> None:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled; a third of the time to import Megatron
        with warnings.catch_warnings():  # about GPU libraries that are not there: nothing to do with data
            warnings.simplefilter("ignore")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            from megatron.core.datasets import indexed_dataset
        self._megatron = indexed_dataset
        self._job = job
        self._counts = [Counts() for _ in job.prefixes]
        self._builders: list[Any] = []
        self._full = False

    def __call__(self, number: int | None) -> list[Counts]:
        """Append the part of that number; None, after one part at least, ends the data.

        Raises:
            UserError: it cannot be written.
        """
        with self._disk():
            if number is not None:
                self._append(*parts.load(self._job.folder, number))
            else:
                for prefix, builder in zip(self._job.prefixes, self._builders, strict=True):
                    builder.finalize(self._megatron.get_idx_path(str(prefix)))
        return self._counts

    def _append(self, tokens: Any, table: Any) -> None:
        if not self._builders:
            self._builders = [
                self._megatron.IndexedDatasetBuilder(
                    self._megatron.get_bin_path(str(prefix)), dtype=tokens.dtype.type
                )
                for prefix in self._job.prefixes
            ]
        start = 0
        for count, size, side in table.tolist():
            if self._full or self._exceeds(count, size):
                self._full = True
                return
            builder, counts = self._builders[side], self._counts[side]
            builder.add_document(tokens[start : start + count], [count])
            start += count
            counts.documents += 1
            counts.tokens += count
            counts.bytes += size
            counts.longest_document = max(counts.longest_document, count)

    def _exceeds(self, count: int, size: int) -> bool:
        job, tokens, text = self._job, count, size
        for counts in self._counts:
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
            place = self._job.prefixes[0].parent
            raise UserError(f"--output: {place} cannot be written ({reason(error)}); make room") from None
