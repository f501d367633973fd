"""Values on their way from one format to the other: blocks of rows, their dtype, whether they are finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_router_upcycling.checkpoint.format.finite import WORDS, all_finite
from megatron_router_upcycling.errors import UserError

BLOCK_BYTES = 8 << 20  # of a tensor in memory at a time: it is still in a cache when it is written
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (start, stop) that follow one another, each of at most BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def ahead[T](tasks: Iterable[Callable[[bytearray], T]]) -> Iterator[T]:
    """The results of ``tasks``, in order, each made in another thread while the one before is in use.

    A task gets memory to make its result in, which is its own until the result after it is asked for.
    """
    scratch, spare = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    with ThreadPoolExecutor(1) as thread:
        coming: Future[T] | None = None
        for task in tasks:
            ready, coming = coming, thread.submit(task, scratch)
            scratch, spare = spare, scratch
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scratch_rows(scratch: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in ``scratch``, which is in memory already; of its own where it does not fit."""
    count = math.prod(shape)
    if count * dtype.itemsize > len(scratch):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(scratch, dtype=dtype, count=count).view(shape)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(values.view(torch.uint8).flatten().numpy())


def check_finite(values: torch.Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: ``where`` names the file and the tensor.
    """
    if not _finite(values):
        raise UserError(f"{where}: holds NaN or infinite values; use another copy of the model")


def cast(values: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """``values`` in ``dtype``; in ``dtype`` already, they are returned as they are.

    Raises:
        UserError: a value is NaN or infinite, or becomes so; ``where`` names the tensor.
    """
    check_finite(values, where)
    if values.dtype == dtype:
        return values
    converted = values.to(dtype)
    if not _finite(converted):
        raise UserError(f"{where}: holds values too large for {dtype_name(dtype)}; choose another --dtype")
    return converted


def _finite(values: torch.Tensor) -> bool:
    return all_finite(values.flatten().view(torch.uint8).numpy().view(WORDS[values.itemsize]), values.dtype)
