"""Safetensors files, read and written by blocks of rows, so that no whole tensor need be in memory.

The safetensors library checks a file before it is read. It writes only tensors that are whole in memory, so
the header of a new file is made here: eight bytes that give its length, then JSON: name -> dtype, shape, and
where the values begin and end. https://huggingface.co/docs/safetensors
"""

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megatron_router_upcycling.checkpoint.publish.checks import all_finite
from megatron_router_upcycling.errors import UserError, error_as

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
ALIGNMENT = 8
SAMPLES, SAMPLE_BYTES = 1024, 4096
BLOCK_BYTES = 8 << 20  # of a tensor in memory at a time: still in the processor's cache when it is written


class Stored(NamedTuple):
    """The location of a tensor in a file; ``dtype`` is the format's name for it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows ``start`` .. ``stop``."""
        dtype = DTYPES[self.dtype]
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        count, offset = (stop - start) * row_bytes, self.offset + start * row_bytes
        found = torch.from_numpy(np.fromfile(self.path, np.uint8, count, offset=offset))
        return found.view(dtype).view(stop - start, *self.shape[1:])


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a whole file, by name."""
    fault = f"{path}: cannot be read, or is cut short, damaged or no safetensors file"
    read = error_as((OSError, SafetensorError), fault, "; download it again")
    with read, safe_open(path, framework="pt"), open(path, "rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        header = json.loads(file.read(length))
    values = LENGTH.size + length
    return {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), values + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def sample_digest(path: Path) -> str:
    """SHA-256 over size, header, and 4 KiB at each of 1024 places: a cheap identity."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(LENGTH.size)
        digest = hashlib.sha256(LENGTH.pack(size) + length + file.read(*LENGTH.unpack(length)))
        for place in range(SAMPLES):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place * size // SAMPLES))
    return digest.hexdigest()


def format_header(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> bytes:
    """The header of a file that holds the values of ``tensors``, in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return LENGTH.pack(len(encoded)) + encoded


def blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges (start, stop) of a tensor's rows, each of at most BLOCK_BYTES or one row."""
    step = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def ahead[T](tasks: Iterable[Callable[[bytearray], T]]) -> Iterator[T]:
    """The results of ``tasks``, in order, each made in a thread while the previous one is in use.

    A task gets a buffer for its result, which is valid until the next result is requested.
    """
    buffers = itertools.cycle((bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)))
    with ThreadPoolExecutor(1) as thread:
        made = (thread.submit(task, scratch) for task, scratch in zip(tasks, buffers, strict=False))
        for ready, _ in itertools.pairwise(itertools.chain(made, [Future[T]()])):  # the next one has begun
            yield ready.result()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(values.view(torch.uint8).flatten().numpy())


def cast(values: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """``values`` in ``dtype``; UserError where one is not finite. ``where`` names the file and the tensor."""
    if not all_finite(values):
        raise UserError(f"{where}: holds NaN or infinite values; use another copy of the model")
    converted = values.to(dtype)
    if converted is not values and not all_finite(converted):
        raise UserError(f"{where}: holds values too large for {dtype_name(dtype)}; choose another --dtype")
    return converted
