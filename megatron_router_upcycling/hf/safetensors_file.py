"""Safetensors files, read and written by ranges of bytes, so that no tensor need be in memory whole.

The format: eight bytes that give the length of a header, the header (JSON: name -> dtype, shape, and where
the values begin and end), the values. https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.errors import UserError

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
ALIGNMENT = 8
SAMPLES, SAMPLE_BYTES = 1024, 4096


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what it is and where its values begin, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int


class SafetensorsFile:
    """A file open for reading; ``entries`` are by name.

    Raises:
        UserError: it cannot be read, is cut short, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
            self.size = os.fstat(self._file.fileno()).st_size
            self.header = self._file.read(LENGTH.size)
            self.entries = self._read_entries()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read_entries(self) -> dict[str, Entry]:
        (length,) = LENGTH.unpack(self.header.ljust(LENGTH.size, b"\0"))
        if self.size < LENGTH.size or (length <= HEADER_LIMIT and self.size < LENGTH.size + length):
            raise self._cut_short(f"{self.size} bytes, its header is not whole")
        if not 2 <= length <= HEADER_LIMIT:
            raise UserError(f"{self.path}: not a safetensors file")
        self.header += self._file.read(length)
        start = LENGTH.size + length
        try:
            header = json.loads(self.header[LENGTH.size :])
            header.pop("__metadata__", None)
            entries = {name: _entry(entry, start) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: not a safetensors file, or damaged") from None
        position = start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].length)):
            if entry.begin != position:
                raise UserError(f"{self.path}: damaged, {name} does not begin where the one before it ends")
            position += entry.length
        if self.size < position:
            raise self._cut_short(f"{self.size} bytes of {position}")
        if self.size > position:
            raise UserError(f"{self.path}: damaged, {self.size - position} bytes too long")
        return entries

    def _cut_short(self, how: str) -> UserError:
        return UserError(f"{self.path}: cut short ({how}); download it again")

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` with a tensor's bytes from ``offset`` on."""
        position = self.entries[name].begin + offset
        while into:
            try:
                count = os.preadv(self._file.fileno(), [into], position)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not count:
                raise self._cut_short("while it was read")
            position, into = position + count, into[count:]

    def sample_digest(self) -> str:
        """SHA-256 over size, header, and 4 KiB at each of 1024 places: an identity that costs little."""
        digest = hashlib.sha256(LENGTH.pack(self.size) + self.header)
        for place in range(SAMPLES):
            digest.update(os.pread(self._file.fileno(), SAMPLE_BYTES, place * self.size // SAMPLES))
        return digest.hexdigest()


def _entry(entry: dict[str, Any], start: int) -> Entry:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    if begin < 0 or end < begin:
        raise ValueError(f"bytes {begin} to {end}")
    return Entry(dtype, shape, start + begin, end - begin)


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
