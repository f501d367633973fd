"""One process at a time makes a folder.

The lock is the kernel's (``flock``), so that it goes with the process that holds it, however that ends.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_router_upcycling.errors import UserError


@contextlib.contextmanager
def held(out: Path, name: str = "OUT") -> Iterator[bool]:
    """Hold the lock of ``out`` while the context lasts; False on a file system without locks.

    Args:
        name: what the command calls ``out``.
    """
    path = out.with_name(f".{out.name}.lock")
    descriptor = _take(path, out, name)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before it is let go: nobody takes a name that is gone
            os.close(descriptor)


def _take(path: Path, out: Path, name: str) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{name} {out}: being made by {holder}; let it finish or name another place"
            ) from None
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        if _is(path, descriptor):
            with contextlib.suppress(OSError):  # a full disk: it is held all the same
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its holder has just removed the file: take the next one of that name


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
