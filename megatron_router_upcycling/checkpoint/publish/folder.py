"""A folder that appears whole or not at all, made by one process at a time.

It is filled under a hidden name next to its destination, flushed, and renamed. Leftovers of a killed run
never have the folder's name, and the next run removes them. Next to a folder ``moe`` there may temporarily
be:

    .moe.lock                    the lock of the process that makes it; the kernel releases it at its end
    .moe.partial-PROCESS-HOST    the folder in the making, or what was replaced and is being removed
    .moe.replaced                the old folder, on a file system that cannot exchange two names at once

On a file system without locks no leftover is removed, since another process may still be filling it.
"""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_router_upcycling.errors import UserError, os_error_as
from megatron_router_upcycling.files import existing, format_bytes, sync

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def check_target(out: Path, source: Path, overwrite: bool, source_name: str, made_by: str) -> None:
    """Refuse ``out`` where data would be lost; a folder that may be replaced holds the file ``made_by``."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"OUT {out}: is, holds or lies in {source_name} {source}; name a folder beside it")
    fault = ""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        fault = "exists and is not a folder: remove it"
    elif out.exists() and not overwrite:
        fault = "exists; pass --overwrite to replace it"
    elif out.exists() and any(out.iterdir()) and not (out / made_by).is_file():
        fault = f"holds no {made_by}, so --overwrite leaves it alone: remove it"
    elif trained := sorted(path.name for path in out.glob("iter_*")):
        fault = f"training has saved {trained[-1]} there, which --overwrite would lose: move it"
    if fault:
        raise UserError(f"OUT {out}: {fault}, or name another folder")


def check_space(out: Path, count: int) -> None:
    """Refuse a disk with fewer than ``count`` bytes free after the removal of leftovers."""
    free = shutil.disk_usage(existing(out.absolute().parent)).free
    with contextlib.suppress(FileNotFoundError):  # its process is alive and works in it
        statuses = [path.lstat() for folder in _left_behind(out.resolve()) for path in folder.rglob("*")]
        free += sum(status.st_size for status in statuses if status.st_nlink == 1)
    if count > free:
        sizes = f"needs {format_bytes(count)} and the disk has {format_bytes(free)} free"
        raise UserError(f"OUT {out}: {sizes}; make room or name a folder on another disk")


@contextlib.contextmanager
def held(out: Path, name: str, way_out: str) -> Iterator[bool]:
    """Make the folder around ``out``, called ``name`` in messages, and hold ``out``'s lock.

    Gives False on a file system without locks. After an exception, folders that were made and are empty go;
    an OSError becomes a UserError with the ``way_out``.
    """
    place = out.resolve()
    created = [parent for parent in place.parents if not parent.exists()]
    with os_error_as(f"{name} {out}: cannot be written", f"; {way_out}"):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place, name) as locked:
                yield locked
        except BaseException:
            for parent in created:
                with contextlib.suppress(OSError):  # something is there: of another process, or kept
                    parent.rmdir()
            raise


@contextlib.contextmanager
def _locked(out: Path, name: str) -> Iterator[bool]:
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path, timeout=0, mode=0o666, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")[:200] or holder
        what = f"being made by {holder}; let it finish or name another place"
        raise UserError(f"{name} {out}: {what}") from None
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
            path.unlink(missing_ok=True)  # before the release, after which it may be another process's
            lock.release()


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` at the context's end; an exception leaves ``out`` unchanged."""
    with held(out, "OUT", "nothing was left behind") as locked:
        out = out.resolve()
        _put_back(out)
        if locked:  # what others have left, and an old folder whose successor is in place
            for path in (_replaced(out), *_left_behind(out)):
                shutil.rmtree(path, ignore_errors=True)
        if out.exists() and not overwrite:
            raise UserError(f"OUT {out}: exists; pass --overwrite or name another folder")
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}-{socket.gethostname()}")
        try:
            partial.mkdir()
            yield partial
            for path in filter(Path.is_file, partial.iterdir()):
                sync(path)
            sync(partial)
            if not (overwrite and out.exists()):
                os.rename(partial, out)  # which fails where another process has put something there
            elif not rename_exchange(partial, out):  # three steps; if they are cut short: ``_put_back``
                os.rename(out, _replaced(out))
                os.rename(partial, out)
                os.rename(_replaced(out), partial)
            sync(out.parent)
        except BaseException:
            _put_back(out)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # unfinished, or what was there before


def _left_behind(out: Path) -> list[Path]:
    """Folders that processes of this machine were filling, or still fill."""
    return list(out.parent.glob(f".{glob.escape(out.name)}.partial-*-{glob.escape(socket.gethostname())}"))


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _put_back(out: Path) -> None:
    """Give the old folder its name again where a run was killed between the two renames."""
    if _replaced(out).exists() and not out.exists():
        os.rename(_replaced(out), out)


def rename_exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", lambda *arguments: -1)
    paths = os.fsencode(first), os.fsencode(second)
    return bool(rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)
