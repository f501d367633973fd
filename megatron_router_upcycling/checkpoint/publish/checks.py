"""Checks of a conversion: its sources do not change while it runs, and its result is intact and as planned.

``torch.save`` writes a CRC-32 of every tensor's values, and ``torch.load`` ignores it. The sources' checksums
are verified in a thread while the kernel copies, which on two cores takes hardly any extra time.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.format import boxes
from megatron_router_upcycling.checkpoint.format.metadata import Blob, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import Damaged, examine, read_values
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError

Target = tuple[boxes.Shape, torch.dtype] | None  # shape and dtype of a tensor, None for an object


def check_whole(
    tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob], targets: Mapping[str, Target]
) -> None:
    """Refuse entries other than ``targets``, and tensors whose chunks do not hold each element once."""
    made: dict[str, Target] = dict.fromkeys(objects)
    made |= {key: (stored.shape, stored.dtype) for key, stored in tensors.items()}
    wrong = {key for key, _ in made.items() ^ targets.items()}
    for key, stored in tensors.items():
        chunks = [chunk.box for chunk in stored.chunks]
        inside = all(boxes.is_inside(stored.shape, chunk) for chunk in chunks)
        if not inside or any(boxes.faults(stored.shape, chunks)):
            wrong.add(key)
    if wrong:
        raise UserError(
            f"OUT: {min(wrong)} is not what was planned; this is a defect of convert; nothing was left behind"
        )


def examine_all(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob]
) -> dict[Blob, bytes]:
    """``examine`` the bytes of every chunk and object, each once, and return their identities."""
    claims: dict[Blob, tuple[str, Target]] = dict.fromkeys(objects.values(), ("an extra state", None))
    for key, stored in tensors.items():
        claims |= {chunk.blob: (key, (chunk.sizes, stored.dtype)) for chunk in stored.chunks}
    identities = {}
    for blob, (key, promised) in claims.items():
        try:
            identities[blob] = examine(folder, blob, promised).identity
        except Damaged as error:
            what = f"{key} {promised[1]} {list(promised[0])}" if promised else key
            raise UserError(
                f"DENSE: {blob.file}, {blob.length} bytes at {blob.offset}: damaged, should hold {what}"
                f" ({error}); use another copy"
            ) from None
    return identities


def content_digests(identities: Mapping[Blob, bytes]) -> dict[str, str]:
    """For each data file, a SHA-256 over the byte ranges and identities of its chunks."""
    digests: dict[str, hashlib._Hash] = {}
    for blob in sorted(identities, key=lambda blob: (blob.file, blob.offset, blob.length)):
        digest = digests.setdefault(blob.file, hashlib.sha256())
        digest.update(f"{blob.offset} {blob.length} ".encode() + identities[blob])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. (In bfloat16 ``isfinite().all()`` takes 20 times as long.)"""
    if not values.numel() or not values.is_floating_point() or values.itemsize == 1:
        return True
    return all(bool(edge.isfinite()) for edge in values.aminmax())  # both are NaN where a value is


class Stamps:
    """The state of ``paths`` when this was created; linking or reading a file does not change it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths if path.is_file()}

    def check(self) -> None:
        """Refuse a file that was written, replaced or removed since."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise UserError(
                    f"{path}: changed while it was read; wait until whatever writes there is done,"
                    " then run the command again"
                )


def _stamp(path: Path) -> tuple[int, ...]:
    """Inode (a replacement has another), size and nanosecond of the last write; empty without a file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def intact_check(tensors: Iterable[tuple[Checkpoint, str]]) -> Iterator[Future[None]]:
    """While the context lasts, check in a thread that ``tensors`` match their checksums and are finite."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as aside:
        try:
            yield aside.submit(_check, tuple(tensors), stopped)
        finally:
            stopped.set()


def _check(tensors: tuple[tuple[Checkpoint, str], ...], stopped: threading.Event) -> None:
    for checkpoint, key in tensors:
        stored = checkpoint.tensors[key]
        for chunk in stored.chunks:
            path, finite = checkpoint.iteration_dir / chunk.blob.file, True
            try:
                if values := checkpoint.find_values(chunk, stored.dtype):
                    for view in read_values(path, values):
                        finite = finite and all_finite(torch.frombuffer(view, dtype=stored.dtype))
                        if stopped.is_set():
                            return
                else:  # they do not lie row after row
                    finite = all_finite(checkpoint.read_chunk(chunk, stored.dtype, bytearray()))
                if not finite:
                    raise Damaged("holds NaN or infinity")
            except Damaged as error:
                where = f"{path}: {key} at {list(chunk.offsets)}"
                raise UserError(f"{where} {error}; use another copy") from None
