"""Files in general: durable writes, digests, sizes, and versions of what wrote them."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path


def existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    names = ("megatron-router-upcycling", "megatron-core", "torch")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def on_one_disk(source: Path, out: Path) -> bool:
    return os.stat(source).st_dev == os.stat(existing(out.absolute().parent)).st_dev
