"""Write a torch_dist checkpoint folder chunk by chunk.

What a source checkpoint already holds is taken over by linking its data files; several chunks may name
the same bytes, so that equal experts are stored once.
"""

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint.format.files import BACKEND, CONFIG
from megatron_router_upcycling.checkpoint.format.metadata import (
    METADATA,
    Blob,
    Chunk,
    StoredTensor,
    format_metadata,
)
from megatron_router_upcycling.checkpoint.format.torch_save_file import (
    STORAGES,
    ZIP32_LIMIT,
    Values,
    wrap_values,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync

COPY_BYTES = 8 << 20
# Another disk, another owner, too many links, or a file system without them.
CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EINVAL)

Progress = Callable[[int], None]


class CheckpointWriter:
    """Fills one iteration's folder; ``finish`` makes it a checkpoint.

    New values go to files of its own, named ``prefix`` and a number, which no file taken over may have.
    ``progress`` is called with the number of bytes after each write.
    """

    def __init__(self, folder: Path, prefix: str = "__0_", progress: Progress = lambda count: None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.prefix, self.progress = folder, prefix, progress
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]] = {}
        self.objects: dict[str, Blob] = {}
        self._linked: dict[str, bool] = {}
        self._copied: dict[Blob, Blob] = {}
        self._flushing: dict[str, Future[None]] = {}
        self._aside = ThreadPoolExecutor(1)
        self._file = self._open()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # its last bytes, on a full disk
            self._file.close()
        self._aside.shutdown(cancel_futures=True)

    def _open(self) -> BinaryIO:
        return open(self.folder / f"{self.prefix}{len(self._flushing)}.distcp", "xb")  # noqa: SIM115

    def next_file(self) -> None:
        """Continue in a new file; the one so far is flushed to the disk meanwhile."""
        self._close()
        self._file = self._open()

    def _close(self) -> None:
        self._file.close()
        path = Path(self._file.name)
        self._flushing[path.name] = self._aside.submit(sync, path)

    def take_over(self, source: Checkpoint, key: str, name: str, copy: bool = False) -> None:
        """Let ``name`` stand for what ``key`` is in ``source``, its bytes unchanged.

        The data file is hard-linked under its own name. With ``copy``, or where no link can be made, the
        bytes are copied, each range once.
        """
        if key in source.objects:
            self.objects[name] = self._take_blob(source, source.objects[key], copy)
            return
        stored = source.tensors[key]
        self.tensors[name] = (stored.shape, stored.dtype, [])
        for chunk in stored.chunks:
            if chunk.verbatim:
                blob = self._take_blob(source, chunk.blob, copy)
                self.tensors[name][2].append(Chunk(chunk.offsets, chunk.sizes, blob))
            else:
                self.store_chunk(
                    source, chunk, stored.dtype, name, stored.shape, chunk.sizes, [chunk.offsets]
                )

    def _take_blob(self, source: Checkpoint, blob: Blob, copy: bool) -> Blob:
        if not copy and self._is_linked(source.iteration_dir / blob.file):
            return blob
        if blob not in self._copied:
            start = self._file.tell()
            self._copy_range(source.iteration_dir / blob.file, blob.offset, blob.length)
            self._copied[blob] = self._written(start)
        return self._copied[blob]

    def _written(self, start: int) -> Blob:
        length = self._file.tell() - start
        self.progress(length)
        return Blob(Path(self._file.name).name, start, length)

    def _is_linked(self, path: Path) -> bool:
        if path.name not in self._linked:
            try:
                os.link(path.resolve(), self.folder / path.name)
                self._linked[path.name] = True
            except OSError as error:
                if error.errno not in CANNOT_LINK:
                    raise
                self._linked[path.name] = False
        return self._linked[path.name]

    def add_object(self, key: str, blob: Blob) -> None:
        self.objects[key] = blob

    def write_object(self, archive: bytes) -> Blob:
        """Write a ``torch.save`` file's bytes and return where they are."""
        start = self._file.tell()
        self._file.write(archive)
        return self._written(start)

    def write_chunk(
        self,
        key: str,
        shape: tuple[int, ...],
        values: torch.Tensor,
        offsets: Iterable[tuple[int, ...]],
        copies: bool = False,
        checksum: int | None = None,
    ) -> None:
        """Write ``values`` as the chunks of ``key`` (of global ``shape``) at every one of ``offsets``.

        The bytes are written once and named by all chunks, or once a chunk with ``copies``.

        Args:
            checksum: CRC-32 of the values, where it is known.
        """
        _, dtype, chunks = self.tensors.setdefault(key, (shape, values.dtype, []))
        assert dtype == values.dtype
        sizes = tuple(values.shape)
        parts: tuple[Any, ...] = ()
        if dtype in STORAGES.values() and 0 < values.nbytes < ZIP32_LIMIT:
            # What torch.save would write, with less copying.
            content = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
            known = zlib.crc32(content) if checksum is None else checksum
            head, tail = wrap_values(Values(0, values.nbytes, known), sizes, dtype)
            parts = head, content, tail
        elif values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()  # a part of something larger, which torch.save would write whole
        blob = None
        for offset in offsets:
            if blob is None or copies:
                start = self._file.tell()
                if parts:
                    self._file.writelines(parts)
                else:
                    torch.save(values, self._file)
                blob = self._written(start)
            chunks.append(Chunk(offset, sizes, blob))

    def store_chunk(
        self,
        source: Checkpoint,
        chunk: Chunk,
        dtype: torch.dtype,
        key: str,
        shape: tuple[int, ...],
        sizes: tuple[int, ...],
        offsets: Iterable[tuple[int, ...]],
        copies: bool = False,
    ) -> None:
        """``write_chunk`` with a chunk of another checkpoint, seen as of ``sizes``."""
        values = source.find_values(chunk, dtype)
        if values and values.length < ZIP32_LIMIT:
            file = source.iteration_dir / chunk.blob.file
            self.copy_chunk(key, shape, sizes, dtype, file, values, offsets, copies)
        else:
            tensor = source.read_chunk(chunk, dtype, bytearray())
            self.write_chunk(key, shape, tensor.view(sizes), offsets, copies)

    def copy_chunk(
        self,
        key: str,
        shape: tuple[int, ...],
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        source: Path,
        values: Values,
        offsets: Iterable[tuple[int, ...]],
        copies: bool = False,
    ) -> None:
        """``write_chunk`` with values that lie in a file; they go from file to file in the kernel."""
        head, tail = wrap_values(values, sizes, dtype)
        _, _, chunks = self.tensors.setdefault(key, (shape, dtype, []))
        blob = None
        for offset in offsets:
            if blob is None or copies:
                start = self._file.tell()
                self._file.write(head)
                self._copy_range(source, values.offset, values.length)
                self._file.write(tail)
                blob = self._written(start)
            chunks.append(Chunk(offset, sizes, blob))

    def _copy_range(self, source: Path, offset: int, length: int) -> None:
        self._file.flush()
        try:
            file = open(source, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
        with file:
            while length:
                count = _copy_some(file.fileno(), self._file.fileno(), offset, length)
                if not count:
                    raise UserError(f"{source}: ends early; it has changed since it was opened")
                offset, length = offset + count, length - count
        self._file.seek(0, os.SEEK_END)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of its own."""
        (self.folder / name).write_bytes(content)
        sync(self.folder / name)

    def finish(self) -> dict[str, StoredTensor]:
        """Write ``.metadata`` and ``metadata.json``; return the tensors when everything is on the disk."""
        self._close()
        tensors = {
            key: StoredTensor(shape, dtype, tuple(chunks))
            for key, (shape, dtype, chunks) in self.tensors.items()
        }
        self.write_file(METADATA, format_metadata(tensors, self.objects))
        config = {"sharded_backend": BACKEND, "sharded_backend_version": 1}
        self.write_file(CONFIG, json.dumps(config).encode())
        for flushed in self._flushing.values():
            flushed.result()
        sync(self.folder)
        return tensors


def _copy_some(source: int, target: int, offset: int, length: int) -> int:
    """Copy bytes from file to file, in the kernel where it can; return how many, 0 at the source's end."""
    try:
        return os.copy_file_range(source, target, length, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.write(target, os.pread(source, min(length, COPY_BYTES), offset))
