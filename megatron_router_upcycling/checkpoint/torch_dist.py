"""Read Megatron's torch_dist checkpoints chunk by chunk.

A checkpoint root holds ``latest_checkpointed_iteration.txt`` and the folder that it names; that folder
is a torch.distributed.checkpoint folder with global tensors; its ``.metadata`` says where they are stored.
"""

import contextlib
import hashlib
import io
import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint import safe_load
from megatron_router_upcycling.checkpoint.archive import Values, find_values
from megatron_router_upcycling.checkpoint.legacy import LegacyCheckpoint
from megatron_router_upcycling.checkpoint.metadata import (
    METADATA,
    Blob,
    Chunk,
    Report,
    StoredTensor,
    parse_metadata,
)
from megatron_router_upcycling.errors import UserError, reason, shown

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
BACKEND = "torch_dist"
COMMON_STATE = "common_state/shard_0_1"
COMMON_FILE = "common.pt"  # where Megatron kept the common state before it became an object
LARGEST_RECORD = 1 << 30  # bytes of metadata or common state; Megatron's are a hundred times smaller


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a checkpoint, open for reading.

    ``tensors`` and ``objects`` (extra states and the like) are by global key; ``common`` is the state
    that all ranks share, with Megatron's arguments in it.
    """

    root: Path
    iteration_dir: Path
    tensors: dict[str, StoredTensor]
    objects: dict[str, Blob]
    common: dict[str, Any]

    @classmethod
    def open_folder(cls, root: Path, folder: Path, report: Report | None = None) -> "Checkpoint":
        """Open one iteration's torch_dist folder and check that it is whole; see ``open_checkpoint``."""
        metadata = folder / METADATA
        tensors, objects = parse_metadata(read_record(metadata), metadata, report)
        checkpoint = cls(root, folder, tensors, objects, {})
        checkpoint.check_files(report)
        try:
            checkpoint.common.update(checkpoint._read_common())
        except (UserError, OSError) as error:
            if report is None:
                raise
            report(COMMON_STATE, f"cannot be read ({error})")
        return checkpoint

    @property
    def args(self) -> Namespace:
        """Megatron's arguments as the run that saved this checkpoint had them."""
        args = self.common.get("args")
        if not isinstance(args, Namespace) or not all(isinstance(name, str) for name in vars(args)):
            raise UserError(
                f"{self.iteration_dir}: holds no training arguments; save it with Megatron's training"
            )
        return args

    def blobs(self, key: str) -> list[Blob]:
        """Where the values of a tensor or an object are stored."""
        if key in self.objects:
            return [self.objects[key]]
        return [chunk.blob for chunk in self.tensors[key].chunks]

    def stored_bytes(self, key: str) -> int:
        """Bytes on disk of a tensor or an object."""
        return sum(blob.length for blob in self.blobs(key))

    def is_verbatim(self, key: str) -> bool:
        """Whether a torch_dist checkpoint can take over the bytes of a tensor or an object."""
        return key in self.objects or all(chunk.verbatim for chunk in self.tensors[key].chunks)

    def largest_chunk(self, key: str) -> int:
        """Bytes of a tensor's largest chunk."""
        stored = self.tensors[key]
        return max(math.prod(chunk.sizes) for chunk in stored.chunks) * stored.dtype.itemsize

    def digest(self) -> str:
        """SHA-256 over ``.metadata`` and the common state: a checkpoint's identity, cheap to compute."""
        digest = hashlib.sha256(read_record(self.iteration_dir / METADATA))
        digest.update(self._common_bytes())
        return digest.hexdigest()

    def read_blob(self, blob: Blob) -> bytes:
        with open(self.iteration_dir / blob.file, "rb") as file:
            file.seek(blob.offset)
            return file.read(blob.length)

    def find_values(self, chunk: Chunk, dtype: torch.dtype) -> Values | None:
        """Where a chunk's values lie in its data file, or None where they are not plainly there."""
        with self._open_blob(chunk.blob) as content:
            found = find_values(content, chunk.stored_sizes, dtype)
        return found and replace(found, offset=chunk.blob.offset + found.offset)

    def read_chunk(self, chunk: Chunk, dtype: torch.dtype, scratch: bytearray) -> torch.Tensor:
        """The values of one chunk, of its ``sizes``.

        They lie in ``scratch`` where it is large enough, until it is used again: memory that is in use
        already is several times as fast to read into.
        """
        values = self.find_values(chunk, dtype)
        if values and 0 < values.length <= len(scratch):
            path = self.iteration_dir / chunk.blob.file
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(values.offset)
                    read_exactly(file, memoryview(scratch)[: values.length])
            except (OSError, EOFError) as error:
                raise UserError(f"{path}: cannot be read ({reason(error)})") from None
            count = math.prod(chunk.sizes)
            return torch.frombuffer(scratch, dtype=dtype, count=count).view(chunk.sizes)
        with self._open_blob(chunk.blob) as content:
            tensor = torch.load(content, map_location="cpu", weights_only=True)
            if (
                not isinstance(tensor, torch.Tensor)
                or tuple(tensor.shape) != chunk.stored_sizes
                or tensor.dtype != dtype
                or tensor.layout != torch.strided
                or tensor.device.type != "cpu"
            ):
                raise ValueError(f"not the {dtype} {list(chunk.stored_sizes)} that {METADATA} promises")
        return tensor.detach().reshape(chunk.sizes)

    @contextlib.contextmanager
    def _open_blob(self, blob: Blob) -> Iterator[BinaryIO]:
        """A blob as a file of its own; whatever fails on its content is the user's damaged file."""
        path = self.iteration_dir / blob.file
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        with file:
            try:
                yield io.BufferedReader(FileRange(file, blob))
            except Exception as error:
                raise UserError(
                    f"{path}: damaged at byte {blob.offset} ({reason(error)}); use another copy"
                ) from None

    def read_layer(self, key: str, layer: int, scratch: bytearray) -> torch.Tensor:
        """``tensor[layer]`` of a tensor stacked over layers; in ``scratch`` as in ``read_chunk``."""
        stored = self.tensors[key]
        chunks = [
            chunk for chunk in stored.chunks if chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
        ]
        if len(chunks) == 1:
            return self.read_chunk(chunks[0], stored.dtype, scratch)[layer - chunks[0].offsets[0]]
        whole = torch.empty(stored.shape[1:], dtype=stored.dtype)
        for chunk in chunks:
            box = tuple(
                map(slice, chunk.offsets[1:], map(sum, zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)))
            )
            whole[box] = self.read_chunk(chunk, stored.dtype, scratch)[layer - chunk.offsets[0]]
        return whole

    def check_files(self, report: Report | None) -> None:
        """Whether each data file is there and as long as the metadata says; faults go to ``report``."""
        needed: dict[str, int] = {}
        for key in (*self.tensors, *self.objects):
            for blob in self.blobs(key):
                needed[blob.file] = max(needed.get(blob.file, 0), blob.offset + blob.length)
        for name, end in sorted(needed.items()):
            path = self.iteration_dir / name
            if not os.path.isfile(path):  # False for a name that cannot be one, too
                fault = "missing; the checkpoint is incomplete, use one that was saved whole"
            elif path.stat().st_size < end:
                fault = (
                    f"half-written ({path.stat().st_size} bytes of at least {end});"
                    " use a checkpoint that was saved whole"
                )
            else:
                continue
            if report is None:
                raise UserError(f"{path}: {fault}")
            report(name, fault.split(";")[0])

    def _common_bytes(self) -> bytes:
        if COMMON_STATE in self.objects:
            blob = self.objects[COMMON_STATE]
            if blob.length > LARGEST_RECORD:
                raise UserError(f"{self.iteration_dir}: common state of {blob.length} bytes")
            return self.read_blob(blob)
        return read_record(self.iteration_dir / COMMON_FILE)

    def _read_common(self) -> dict[str, Any]:
        if COMMON_STATE in self.objects:
            source = f"{self.iteration_dir}: common state"
            loaded = safe_load.load_archive(self._common_bytes(), source)
            common = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else None
        else:
            source = str(self.iteration_dir / COMMON_FILE)
            common = safe_load.load_archive(self._common_bytes(), source)
        if not isinstance(common, dict):
            raise UserError(f"{source}: not a dictionary; use a checkpoint that Megatron's training saved")
        return common


class FileRange(io.RawIOBase):
    """A range of a file as a file of its own, for ``torch.load``; nothing is copied twice."""

    def __init__(self, file: BinaryIO, blob: Blob) -> None:
        self.file, self.blob, self.position = file, blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.blob.length)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.blob.length - self.position)]
        self.file.seek(self.blob.offset + self.position)
        count = self.file.readinto(view)  # type: ignore[attr-defined]
        self.position += count
        return count


def read_exactly(file: io.RawIOBase, view: memoryview) -> None:
    """Fill ``view`` from ``file``, which may give less at a time."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError("the file ends early")
        done += count


def iteration_dir(root: Path) -> Path:
    """The folder of the newest iteration under ``root``.

    Raises:
        UserError: nothing there.
    """
    tracker = root / TRACKER
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name a checkpoint's root, the folder of {TRACKER}")
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if (root / METADATA).exists() or (root / CONFIG).exists():
            raise UserError(f"{root}: one iteration's folder; name the checkpoint's root above it") from None
        raise UserError(f"{root}: no checkpoint there (no {TRACKER}); name a checkpoint's root") from None
    if text != "release" and not (text.isdecimal() and len(text) < 20):
        raise UserError(f"{tracker}: says {text[:40]!r} where an iteration or 'release' is expected")
    folder = root / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise UserError(f"{folder}: missing, though {tracker} names it; the checkpoint is incomplete")
    return folder


def open_checkpoint(root: str | Path, report: Report | None = None) -> Checkpoint:
    """Open the newest checkpoint under ``root``, torch_dist or legacy, and check that it is whole.

    Args:
        report: called with tensor or file and fault, instead of raising, where the checkpoint is not
            whole or not self-consistent.

    Raises:
        UserError: nothing there, another format, half-written, or not safe to read.
    """
    root = Path(root)
    folder = iteration_dir(root)
    if not (folder / CONFIG).exists() and any(folder.glob("mp_rank_*")):
        return LegacyCheckpoint.open_folder(root, folder)
    _check_backend(folder)
    return Checkpoint.open_folder(root, folder, report)


def check_whole(root: str | Path) -> None:
    """Refuse what cannot be trained from: a checkpoint that is missing or half-written.

    Only names and sizes of a torch_dist checkpoint are looked at; Megatron's other formats pass.

    Raises:
        UserError: no folder that the tracker names, damaged metadata, a data file that is too short.
    """
    root = Path(root)
    folder = iteration_dir(root)
    if (folder / CONFIG).exists() or not any(folder.glob("mp_rank_*")):
        metadata = folder / METADATA
        if _backend(folder) == BACKEND:
            Checkpoint(root, folder, *parse_metadata(read_record(metadata), metadata), {}).check_files(None)


def _check_backend(folder: Path) -> None:
    backend = _backend(folder)
    if backend != BACKEND:
        raise UserError(
            f"{folder / CONFIG}: format {shown(backend)!r}; save the checkpoint with --ckpt-format {BACKEND}"
        )


def _backend(folder: Path) -> Any:
    config = folder / CONFIG
    try:
        return json.loads(read_record(config)).get("sharded_backend")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{config}: not JSON; the checkpoint is incomplete") from None


def read_record(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise UserError(f"{path}: of {path.stat().st_size} bytes, which no checkpoint needs")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; the checkpoint is incomplete, use one that was saved whole"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
