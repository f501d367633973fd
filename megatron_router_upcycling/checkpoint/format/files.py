"""Find and read a checkpoint's files."""

import io
import re
from pathlib import Path
from typing import Any, BinaryIO

from megatron_router_upcycling.checkpoint.format.metadata import METADATA, Blob
from megatron_router_upcycling.checkpoint.names import RELEASE, TRACKER
from megatron_router_upcycling.errors import UserError, os_error_as

CONFIG = "metadata.json"
BACKEND = "torch_dist"
COMMON_STATE = "common_state/shard_0_1"
COMMON_FILE = "common.pt"  # where Megatron kept the common state before it became an object
ITERATION = re.compile(r"iter_\d{7,}|release")
LARGEST_RECORD = 1 << 30  # bytes of metadata or common state; Megatron's are a hundred times smaller


class FileRange(io.RawIOBase):
    """A range of a file, as a read-only file."""

    def __init__(self, file: BinaryIO, blob: Blob) -> None:
        self.file, self.blob, self.position = file, blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.blob.length)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.blob.length - self.position)]
        self.file.seek(self.blob.offset + self.position)
        count = self.file.readinto(view)  # type: ignore[attr-defined]
        self.position += count
        return count


def read_exactly(file: io.BufferedReader, view: memoryview) -> None:
    """Fill ``view`` from ``file``; EOFError where the file ends early."""
    if file.readinto(view) < len(view):
        raise EOFError("the file ends early")


def locate(root: Path) -> tuple[Path, Path]:
    """A checkpoint's root and the folder of its newest iteration; ``root`` may itself be an iteration's."""
    folder, tracker = root, root / TRACKER
    if is_root := tracker.is_file():
        text = read_record(tracker).decode(errors="replace").strip()
        if text != RELEASE and not (text.isdecimal() and len(text) < 20):
            raise UserError(f"{tracker}: says {text[:40]!r} where an iteration or {RELEASE!r} is expected")
        folder = root / (text if text == RELEASE else f"iter_{int(text):07d}")
    if any((folder / name).exists() for name in (METADATA, CONFIG)) or any(folder.glob("mp_rank_*")):
        return root if is_root else root.absolute().parent, folder
    there = {path.name for place in (root, folder.parent) for path in place.glob("*")}
    iterations = ", ".join(sorted(filter(ITERATION.fullmatch, there)))
    raise UserError(
        f"{folder}: no checkpoint there; name a checkpoint's root, the folder of {TRACKER}, or an iteration"
        f" ({iterations or 'there is none'})"
    )


def read_record(path: Path) -> bytes:
    with os_error_as(f"{path}: cannot be read", "; use a checkpoint that was saved whole"):
        if path.stat().st_size > LARGEST_RECORD:
            raise UserError(f"{path}: of {path.stat().st_size} bytes, which no checkpoint needs")
        return path.read_bytes()
