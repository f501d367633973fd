"""One process at a time makes a folder.

The lock is the kernel's, so that it goes with the process that holds it, however that ends.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_router_upcycling.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(out: Path, name: str = "OUT") -> Iterator[bool]:
    """Hold the lock of ``out`` while the context lasts; False on a file system without locks.

    Where another process holds it, the error names that process.

    Args:
        name: what the command calls ``out``.
    """
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path, timeout=0, mode=0o666, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")[:200]
        raise UserError(
            f"{name} {out}: being made by {holder or 'another process'}; let it finish or name another place"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
    try:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # a full disk: it is held all the same
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield lock.is_locked
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # before it is let go: nobody takes a name that is gone
            lock.release()
