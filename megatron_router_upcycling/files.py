"""Helpers for files: atomic writes, digests, sizes, and versions of the software that wrote them."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path


def existing(folder: Path) -> Path:
    """``folder``, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def blocked_by(path: Path) -> Path | None:
    """The read-only folder or the file that keeps ``path`` from being made, or None."""
    place = existing(path.absolute())
    return None if place.is_dir() and os.access(place, os.W_OK) else place


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``path`` atomically, by flushing and renaming a hidden file next to it; may raise OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of ``packages`` (default: this package, Megatron and PyTorch)."""
    found = {"python": platform.python_version()}
    for name in packages or ("megatron-router-upcycling", "megatron-core", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
