"""Safetensors files, read and written by blocks of rows, so that no tensor need be in memory whole.

The safetensors library reads and checks them. It writes only what is in memory whole, so the header of a
file to write is made here: eight bytes that give its length, then JSON: name -> dtype, shape, and where the
values begin and end. https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_router_upcycling.checkpoint.publish.source_check import all_finite
from megatron_router_upcycling.errors import UserError, reason

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
ALIGNMENT = 8
SAMPLES, SAMPLE_BYTES = 1024, 4096
MAPPED_BYTES = 32 << 20
BLOCK_BYTES = 8 << 20  # of a tensor in memory at a time: it is still in a cache when it is written


@dataclass(frozen=True)
class Entry:
    """What a file says of a tensor; ``dtype`` in the words of the format."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFile:
    """A file open for reading; ``entries`` are by name.

    The library maps the file into memory, and what was read counts as the process's own memory while it is
    mapped. So the file is mapped anew after every ``MAPPED_BYTES``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map()
        slices = {name: self._mapped.get_slice(name) for name in self._mapped.keys()}  # noqa: SIM118
        self.entries = {
            name: Entry(found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()
        }

    def _map(self) -> None:
        try:
            self._mapped = safe_open(self.path, framework="pt")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({reason(error)})") from None
        except SafetensorError as error:
            raise UserError(
                f"{self.path}: cut short, damaged or not a safetensors file ({reason(error)});"
                " download it again"
            ) from None
        self._bytes_read = 0

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The rows ``start`` .. ``stop`` of a tensor, in the mapped file: to be copied, not kept."""
        if self._bytes_read > MAPPED_BYTES:
            self._map()
        found: torch.Tensor = self._mapped.get_slice(name)[start:stop]
        self._bytes_read += found.nbytes
        return found


def sample_digest(path: Path) -> str:
    """SHA-256 over size, header, and 4 KiB at each of 1024 places: an identity that costs little."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(LENGTH.size)
        digest = hashlib.sha256(LENGTH.pack(size) + length + file.read(*LENGTH.unpack(length)))
        for place in range(SAMPLES):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place * size // SAMPLES))
    return digest.hexdigest()


def format_header(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> bytes:
    """What stands before the values of ``tensors``, which follow one another in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return LENGTH.pack(len(encoded)) + encoded


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


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(values.view(torch.uint8).flatten().numpy())


def check_finite(values: torch.Tensor, where: str) -> None:
    """Refuse NaN and infinity; ``where`` names the file and the tensor."""
    if not all_finite(values):
        raise UserError(f"{where}: holds NaN or infinite values; use another copy of the model")


def cast(values: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """``values`` in ``dtype``; in ``dtype`` already, they are returned as they are.

    A value that is NaN or infinite, or becomes so, is refused; ``where`` names the tensor.
    """
    check_finite(values, where)
    if values.dtype == dtype:
        return values
    converted = values.to(dtype)
    if not all_finite(converted):
        raise UserError(f"{where}: holds values too large for {dtype_name(dtype)}; choose another --dtype")
    return converted
