"""Write a torch_dist checkpoint folder chunk by chunk.

What a source checkpoint already holds is taken over by linking its data files; several chunks may name
the same bytes, so that equal experts are stored once.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import safe_load
from megatron_router_upcycling.checkpoint.torch_dist import (
    BACKEND,
    CONFIG,
    METADATA,
    Blob,
    Checkpoint,
    Chunk,
    StoredTensor,
)

COPY_BYTES = 8 << 20
NEW_FILE = "__upcycled_0.distcp"
DCP = "torch.distributed.checkpoint"
DCP_VERSION = "1.0.0"

Progress = Callable[[int], None]


class CheckpointWriter:
    """Fills one iteration's folder; ``finish`` makes it a checkpoint.

    ``progress`` is called with the number of bytes after each write.
    """

    def __init__(self, folder: Path, progress: Progress = lambda count: None) -> None:
        folder.mkdir()
        self.folder, self.progress = folder, progress
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list[Chunk]]] = {}
        self.objects: dict[str, Blob] = {}
        self.file_digests: dict[str, dict[str, Any]] = {}
        self._new = _HashedFile(folder / NEW_FILE, progress)
        self._linked: dict[str, bool] = {}
        self._copied: dict[Blob, Blob] = {}

    def take_over(self, source: Checkpoint, key: str, name: str, copy: bool = False) -> None:
        """Let ``name`` stand for what ``key`` is in ``source``, its bytes unchanged.

        The data file is hard-linked under its own name. With ``copy``, or where no link can be made, the
        bytes are copied, each range once.
        """
        if key in source.objects:
            self.objects[name] = self._take_blob(source, source.objects[key], copy)
            return
        stored = source.tensors[key]
        chunks = [
            Chunk(chunk.offsets, chunk.sizes, self._take_blob(source, chunk.blob, copy))
            for chunk in stored.chunks
        ]
        self.tensors[name] = (stored.shape, stored.dtype, chunks)

    def _take_blob(self, source: Checkpoint, blob: Blob, copy: bool) -> Blob:
        if not copy and self._is_linked(source.iteration_dir / blob.file):
            return blob
        if blob not in self._copied:
            start = self._new.tell()
            with open(source.iteration_dir / blob.file, "rb") as file:
                file.seek(blob.offset)
                for begin in range(0, blob.length, COPY_BYTES):
                    self._new.write(file.read(min(COPY_BYTES, blob.length - begin)))
            self._copied[blob] = Blob(NEW_FILE, start, blob.length)
        return self._copied[blob]

    def _is_linked(self, path: Path) -> bool:
        if path.name not in self._linked:
            try:
                os.link(path.resolve(), self.folder / path.name)
                self._linked[path.name] = True
            except OSError:  # another disk, another owner, or a file system without links
                self._linked[path.name] = False
        return self._linked[path.name]

    def add_object(self, key: str, blob: Blob) -> None:
        self.objects[key] = blob

    def write_object(self, archive: bytes) -> Blob:
        """Write a ``torch.save`` file's bytes and return where they are."""
        offset = self._new.tell()
        self._new.write(archive)
        return Blob(NEW_FILE, offset, len(archive))

    def write_chunk(
        self,
        key: str,
        shape: tuple[int, ...],
        values: torch.Tensor,
        offsets: Iterable[tuple[int, ...]],
        copies: bool = False,
    ) -> None:
        """Write ``values`` as the chunks of ``key`` (of global ``shape``) at every one of ``offsets``.

        The bytes are written once and named by all chunks, or once a chunk with ``copies``.
        """
        _, dtype, chunks = self.tensors.setdefault(key, (shape, values.dtype, []))
        assert dtype == values.dtype
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()  # a part of something larger, which torch.save would write whole
        blob = None
        for offset in offsets:
            if blob is None or copies:
                start = self._new.tell()
                torch.save(values, self._new)
                blob = Blob(NEW_FILE, start, self._new.tell() - start)
            chunks.append(Chunk(offset, tuple(values.shape), blob))

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of its own."""
        with _HashedFile(self.folder / name, lambda count: None) as file:
            file.write(content)
        self.file_digests[name] = file.record()

    def finish(self) -> None:
        """Write ``.metadata`` and ``metadata.json``, and flush everything to the disk."""
        self._new.close()
        self.file_digests[NEW_FILE] = self._new.record()
        tensors = {
            key: StoredTensor(shape, dtype, tuple(chunks))
            for key, (shape, dtype, chunks) in self.tensors.items()
        }
        config = {"sharded_backend": BACKEND, "sharded_backend_version": 1}
        self.write_file(METADATA, format_metadata(tensors, self.objects))
        self.write_file(CONFIG, json.dumps(config).encode())
        sync_folder(self.folder)


class _HashedFile:
    """A new file that is hashed as it is written and flushed to the disk when closed."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self.digest, self.length, self.progress = hashlib.sha256(), 0, progress

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        written = 0
        while written < len(view):
            written += self.file.write(view[written:])
        self.length += written
        self.progress(written)
        return written

    def tell(self) -> int:
        return self.length

    def flush(self) -> None: ...

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()

    def record(self) -> dict[str, Any]:
        return {"bytes": self.length, "sha256": self.digest.hexdigest()}

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.file.close() if kind else self.close()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_metadata(tensors: dict[str, StoredTensor], objects: dict[str, Blob]) -> bytes:
    """The bytes of a ``.metadata`` file (torch.distributed.checkpoint.metadata.Metadata, pickled)."""

    def record(name: str, **state: Any) -> Any:
        return safe_load.inert(f"{DCP}.metadata", name, state=state)

    # Equal values are one object, which is pickled once: equal experts' bytes, every chunk's sizes.
    @functools.cache
    def info(blob: Blob) -> Any:
        state = {"relative_path": blob.file, "offset": blob.offset, "length": blob.length}
        return safe_load.inert(f"{DCP}.filesystem", "_StorageInfo", state=state)

    size = functools.cache(torch.Size)
    layout = safe_load.inert("torch.serialization", "_get_layout", "torch.strided")
    contiguous = safe_load.inert(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING", 0)
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, stored in tensors.items():
        properties = (stored.dtype, layout, False, contiguous, False, None)
        chunks = []
        for chunk in stored.chunks:
            offsets = size(chunk.offsets)
            chunks.append(record("ChunkStorageMetadata", offsets=offsets, sizes=size(chunk.sizes)))
            storage[record("MetadataIndex", fqn=key, offset=offsets, index=None)] = info(chunk.blob)
        entries[key] = record(
            "TensorStorageMetadata",
            properties=safe_load.inert(f"{DCP}.metadata", "TensorProperties", state=properties),
            size=size(stored.shape),
            chunks=chunks,
        )
    for key, blob in objects.items():
        entries[key] = record("BytesStorageMetadata")
        storage[record("MetadataIndex", fqn=key, offset=None, index=None)] = info(blob)
    return safe_load.dumps(
        record(
            "Metadata",
            state_dict_metadata=entries,
            planner_data=None,
            storage_data=storage,
            storage_meta=None,
            version=DCP_VERSION,
        )
    )
