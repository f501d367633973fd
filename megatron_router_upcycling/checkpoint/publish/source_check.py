"""A conversion's sources: its files stay as they are meanwhile, its values are what was saved, and numbers.

``torch.save`` writes a CRC-32 beside every tensor's values, and ``torch.load`` ignores it. Here each block of
values is read, goes into the checksum, and is searched for NaN and infinity. The conversion copies in the
kernel meanwhile, so that on two cores the check takes hardly any time of its own.
"""

import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.format.files import read_exactly
from megatron_router_upcycling.checkpoint.format.finite import WORDS, all_finite
from megatron_router_upcycling.checkpoint.format.metadata import Chunk
from megatron_router_upcycling.checkpoint.format.torch_save_file import Values
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason

BLOCK_BYTES = 2 << 20  # stays in a processor's cache between the two looks at it
Stamp = tuple[int, int, int]  # inode, size, time of the last write in nanoseconds


class Stamps:
    """What ``paths`` were like when this was made.

    A write changes a file's time, a replacement its inode. Linking or reading a file changes neither.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths if path.is_file()}

    def check(self) -> None:
        """Refuse a file that was written, replaced or removed since."""
        for path, stamp in self._stamps.items():
            if not path.is_file() or _stamp(path) != stamp:
                raise UserError(
                    f"{path}: changed while it was read; wait until whatever writes there is done,"
                    " then run the command again"
                )


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


class IntactCheck:
    """Checks the tensors ``keys`` of ``checkpoint`` in a thread of its own, from the first to the last.

    ``wait`` returns once all were found right. Leaving the context stops the check.
    """

    def __init__(self, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
        self._checkpoint, self._keys = checkpoint, tuple(keys)
        self._stopped = threading.Event()
        self._aside = ThreadPoolExecutor(1)
        self._done: Future[None] = self._aside.submit(self._run)

    def __enter__(self) -> "IntactCheck":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._aside.shutdown()

    def wait(self) -> None:
        """Wait for the last tensor; refuse values that are not what was saved, or not finite."""
        self._done.result()

    def _run(self) -> None:
        block = bytearray(BLOCK_BYTES)
        for key in self._keys:
            stored = self._checkpoint.tensors[key]
            for chunk in stored.chunks:
                values = self._checkpoint.find_values(chunk, stored.dtype)
                if values is None:
                    tensor = self._checkpoint.read_chunk(chunk, stored.dtype, bytearray())
                    self._refuse_unless(bool(tensor.isfinite().all()), key, chunk, "holds NaN or infinity")
                else:
                    self._check(key, chunk, stored.dtype, values, block)
                if self._stopped.is_set():
                    return

    def _check(self, key: str, chunk: Chunk, dtype: torch.dtype, values: Values, block: bytearray) -> None:
        path, checksum, finite = self._checkpoint.iteration_dir / chunk.blob.file, 0, True
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(values.offset)
                for done in range(0, values.length, BLOCK_BYTES):
                    view = memoryview(block)[: min(BLOCK_BYTES, values.length - done)]
                    read_exactly(file, view)
                    checksum = zlib.crc32(view, checksum)
                    finite = finite and all_finite(
                        np.frombuffer(view, WORDS.get(dtype.itemsize, np.uint8)), dtype
                    )
                    if self._stopped.is_set():
                        return
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        self._refuse_unless(checksum == values.checksum, key, chunk, "is not what was saved (checksum)")
        self._refuse_unless(finite, key, chunk, "holds NaN or infinity")

    def _refuse_unless(self, right: bool, key: str, chunk: Chunk, what: str) -> None:
        if not right:
            path = self._checkpoint.iteration_dir / chunk.blob.file
            raise UserError(f"{path}: {key} at {list(chunk.offsets)} {what}; use another copy")
