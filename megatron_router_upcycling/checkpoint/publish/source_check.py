"""A conversion's sources: its files stay as they are meanwhile, its values are what was saved, and numbers.

``torch.save`` writes a CRC-32 beside every tensor's values, and ``torch.load`` ignores it. It is checked here
while the conversion copies in the kernel, so that on two cores it takes hardly any time of its own.
"""

import contextlib
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.format.files import read_exactly
from megatron_router_upcycling.checkpoint.format.metadata import Chunk
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason

BLOCK_BYTES = 2 << 20  # stays in a processor's cache between the two looks at it


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. (In bfloat16 ``isfinite().all()`` takes 20 times as long.)"""
    if not values.numel() or not values.is_floating_point() or values.itemsize == 1:
        return True
    return all(bool(edge.isfinite()) for edge in values.aminmax())  # both are NaN where a value is


class Stamps:
    """What ``paths`` were like when this was made.

    A write changes a file's time, a replacement its inode. Linking or reading a file changes neither.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths if path.is_file()}

    def check(self) -> None:
        """Refuse a file that was written, replaced or removed since."""
        for path, stamp in self._stamps.items():
            if stamp is None or _stamp(path) != stamp:
                raise UserError(
                    f"{path}: changed while it was read; wait until whatever writes there is done,"
                    " then run the command again"
                )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Inode, size, and the time of the last write in nanoseconds; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def intact_check(checkpoint: Checkpoint, keys: Iterable[str]) -> Iterator[Future[None]]:
    """Check the tensors ``keys`` in a thread of its own, until the context is left.

    The result comes once all were found right; it raises where values are not what was saved, or not finite.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as aside:
        try:
            yield aside.submit(_check, checkpoint, tuple(keys), stopped)
        finally:
            stopped.set()


def _check(checkpoint: Checkpoint, keys: tuple[str, ...], stopped: threading.Event) -> None:
    buffer = bytearray(BLOCK_BYTES)
    for key in keys:
        stored = checkpoint.tensors[key]
        for chunk in stored.chunks:
            if stopped.is_set():
                return
            if what := _fault(checkpoint, chunk, stored.dtype, buffer, stopped):
                path = checkpoint.iteration_dir / chunk.blob.file
                raise UserError(f"{path}: {key} at {list(chunk.offsets)} {what}; use another copy")


def _fault(
    checkpoint: Checkpoint, chunk: Chunk, dtype: torch.dtype, buffer: bytearray, stopped: threading.Event
) -> str:
    """What is wrong with a chunk's values, which are read into ``buffer`` in turn; else nothing."""
    values = checkpoint.find_values(chunk, dtype)
    if values is None:  # they do not lie row after row
        tensor = checkpoint.read_chunk(chunk, dtype, bytearray())
        return "" if all_finite(tensor) else "holds NaN or infinity"
    path, checksum, finite = checkpoint.iteration_dir / chunk.blob.file, 0, True
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(values.offset)
            for done in range(0, values.length, BLOCK_BYTES):
                view = memoryview(buffer)[: min(BLOCK_BYTES, values.length - done)]
                read_exactly(file, view)
                checksum = zlib.crc32(view, checksum)
                finite = finite and all_finite(torch.frombuffer(view, dtype=dtype))
                if stopped.is_set():
                    return ""
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    if checksum != values.checksum:
        return "is not what was saved (checksum)"
    return "" if finite else "holds NaN or infinity"
