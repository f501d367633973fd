"""Write a torch_dist checkpoint folder: link a source's files, and store equal experts' bytes once."""

import contextlib
import errno
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from megatron_router_upcycling.checkpoint.format import metadata, torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Shape
from megatron_router_upcycling.checkpoint.format.files import BACKEND, CONFIG
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import ZIP32_LIMIT, Values, wrap_values
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, os_error_as
from megatron_router_upcycling.files import sync

COPY_BYTES = 8 << 20
# Another disk, another owner, too many links, or a file system without them.
CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EINVAL)
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # in the kernel

Progress = Callable[[int], None]


class InFile(NamedTuple):
    """Values in a file, viewed as ``shape``; the kernel copies them from file to file."""

    path: Path
    place: Values
    shape: Shape
    dtype: torch.dtype


def stored_values(
    source: Checkpoint, chunk: Chunk, dtype: torch.dtype, sizes: Shape
) -> torch.Tensor | InFile:
    """A chunk of another checkpoint, viewed as ``sizes``, for ``write_chunk``."""
    place = source.find_values(chunk, dtype)
    if place and place.length < ZIP32_LIMIT:
        return InFile(source.iteration_dir / chunk.blob.file, place, sizes, dtype)
    return source.read_chunk(chunk, dtype, bytearray()).view(sizes)


class CheckpointWriter:
    """Fills one iteration's folder; ``finish`` makes it a checkpoint.

    New values go to new files, named ``prefix`` and a number; ``progress`` is called with bytes written.
    """

    def __init__(self, folder: Path, prefix: str = "__0_", progress: Progress = lambda count: None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.prefix, self.progress = folder, prefix, progress
        self.tensors: dict[str, tuple[Shape, torch.dtype, list[Chunk]]] = {}
        self.objects: dict[str, Blob] = {}
        self._linked = functools.cache(self._link)
        self._copy = functools.cache(self._copy_blob)
        self._flushing: list[Future[None]] = []
        self._aside = ThreadPoolExecutor(1)
        self._file = self._open()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # flushing its last bytes to a full disk
            self._file.close()
        self._aside.shutdown(cancel_futures=True)

    def _open(self) -> BinaryIO:
        return open(self.folder / f"{self.prefix}{len(self._flushing)}.distcp", "xb")  # noqa: SIM115

    def next_file(self) -> None:
        """Continue in a new file; the previous one is flushed to disk in the background."""
        self._close()
        self._file = self._open()

    def _close(self) -> None:
        self._file.close()
        self._flushing.append(self._aside.submit(sync, Path(self._file.name)))

    def take_over(self, source: Checkpoint, key: str, name: str, copy: bool = False) -> None:
        """Add the tensor or object ``key`` of ``source`` as ``name``, its values unchanged.

        The data file is hard-linked; with ``copy``, or where no link can be made, bytes are copied once.
        """
        if key in source.objects:
            self.objects[name] = self._take_blob(source, source.objects[key], copy)
            return
        stored = source.tensors[key]
        self.tensors[name] = (stored.shape, stored.dtype, [])
        for chunk in stored.chunks:
            self.take_chunk(source, chunk, name, stored.shape, stored.dtype, [chunk.offsets], copy)

    def take_chunk(
        self,
        source: Checkpoint,
        chunk: Chunk,
        name: str,
        shape: Shape,
        dtype: torch.dtype,
        offsets: Iterable[Shape],
        copy: bool = False,
    ) -> None:
        """Add a chunk of ``source`` to ``name``, of global ``shape``, at every one of ``offsets``."""
        if chunk.stored is None:
            blob = self._take_blob(source, chunk.blob, copy)
            chunks = self.tensors.setdefault(name, (shape, dtype, []))[2]
            chunks += [Chunk(offset, chunk.sizes, blob) for offset in offsets]
        else:
            self.write_chunk(name, shape, stored_values(source, chunk, dtype, chunk.sizes), offsets)

    def _take_blob(self, source: Checkpoint, blob: Blob, copy: bool) -> Blob:
        path = source.iteration_dir / blob.file
        linked = None if copy else self._linked(path)
        return Blob(linked, blob.offset, blob.length) if linked else self._copy(path, blob)

    def _copy_blob(self, path: Path, blob: Blob) -> Blob:
        return self._written(lambda: self._copy_range(path, blob.offset, blob.length))

    def _link(self, path: Path) -> str | None:
        """Link a data file and return its name here; None where no link can be made."""
        name = path.name
        while name.startswith(self.prefix) or (self.folder / name).exists():  # its source was converted too
            name = f"__source{name}"
        try:
            os.link(path.resolve(), self.folder / name)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
            return None
        return name

    def _written(self, write: Callable[[], object]) -> Blob:
        start = self._file.tell()
        write()
        length = self._file.tell() - start
        self.progress(length)
        return Blob(Path(self._file.name).name, start, length)

    def write_object(self, archive: bytes) -> Blob:
        """Write a ``torch.save`` file's bytes."""
        return self._written(lambda: self._file.write(archive))

    def write_chunk(
        self,
        key: str,
        shape: Shape,
        values: torch.Tensor | InFile,
        offsets: Iterable[Shape],
        copies: bool = False,
        checksum: int | None = None,
    ) -> None:
        """Write ``values`` as the chunks of ``key`` (of global ``shape``) at every one of ``offsets``: their
        bytes once, or with ``copies`` for each chunk. ``checksum``: CRC-32 of the values, if known."""
        sizes = tuple(values.shape)
        _, dtype, chunks = self.tensors.setdefault(key, (shape, values.dtype, []))
        assert dtype == values.dtype
        blob = None
        for offset in offsets:
            if blob is None or copies:
                blob = self._written(lambda: self._write_values(values, sizes, checksum))
            chunks.append(Chunk(offset, sizes, blob))

    def _write_values(self, values: torch.Tensor | InFile, sizes: Shape, checksum: int | None) -> None:
        if isinstance(values, InFile):
            head, tail = wrap_values(values.place, sizes, values.dtype)
            self._file.write(head)
            self._copy_range(values.path, values.place.offset, values.place.length)
            self._file.write(tail)
        elif values.dtype in torch_save_file.STORAGES.values() and 0 < values.nbytes < ZIP32_LIMIT:
            # What torch.save would write, with less copying.
            content = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
            known = zlib.crc32(content) if checksum is None else checksum
            head, tail = wrap_values(Values(0, values.nbytes, known), sizes, values.dtype)
            self._file.writelines((head, content, tail))
        else:
            is_view = values.untyped_storage().nbytes() != values.nbytes  # torch.save saves all of it
            torch.save(values.clone() if is_view else values, self._file)

    def _copy_range(self, source: Path, offset: int, length: int) -> None:
        self._file.flush()
        with os_error_as(f"{source}: cannot be read"):
            file = open(source, "rb", buffering=0)  # noqa: SIM115
        with file:
            while length:
                try:
                    count = os.copy_file_range(file.fileno(), self._file.fileno(), length, offset)
                except OSError as error:
                    if error.errno not in CANNOT_COPY:
                        raise
                    content = os.pread(file.fileno(), min(length, COPY_BYTES), offset)
                    count = os.write(self._file.fileno(), content)
                if not count:
                    raise UserError(f"{source}: ends early; it has changed since it was opened")
                offset, length = offset + count, length - count
        self._file.seek(0, os.SEEK_END)

    def write_file(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        sync(self.folder / name)

    def finish(self) -> dict[str, StoredTensor]:
        """Write ``.metadata`` and ``metadata.json``; return the tensors when everything is on the disk."""
        self._close()
        tensors = {
            key: StoredTensor(shape, dtype, tuple(chunks))
            for key, (shape, dtype, chunks) in self.tensors.items()
        }
        self.write_file(metadata.METADATA, metadata.format_metadata(tensors, self.objects))
        config = {"sharded_backend": BACKEND, "sharded_backend_version": 1}
        self.write_file(CONFIG, json.dumps(config).encode())
        for flushed in self._flushing:
            flushed.result()
        sync(self.folder)
        return tensors
