"""A folder that appears whole or not at all.

It is filled under a hidden name beside its place, flushed, and renamed. What a killed run has left
behind never looks like the folder, and the next run removes it. Beside a folder called ``moe`` there may
stand for a while:

    .moe.lock                    which process makes it; the kernel releases it when that process ends
    .moe.partial-PROCESS-HOST    the folder in the making, or what was replaced and is being removed
    .moe.replaced                the old folder, on a file system that cannot exchange two names at once
"""

import contextlib
import ctypes
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_router_upcycling.checkpoint.format.files import TRACKER
from megatron_router_upcycling.checkpoint.publish import lock
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import existing, format_bytes, sync

AT_FDCWD = -100
RENAME_EXCHANGE = 2
IDLE_SECONDS = 3600  # after which a folder that another machine was filling counts as left behind


def check_target(
    out: Path, source: Path, overwrite: bool, source_name: str = "DENSE", made_by: str = TRACKER
) -> None:
    """Refuse a place for ``out`` where something would be lost. Touches nothing.

    Args:
        source_name: what the command calls ``source``.
        made_by: the file that says that such a command has made ``out``.

    Raises:
        UserError: it exists and ``overwrite`` is not set, was made by something else or training has
            saved to it, or it and ``source`` lie one inside the other.
    """
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"OUT {out}: is, holds or lies in {source_name} {source}; name a folder beside it")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"OUT {out}: exists and is not a folder; name another")
    if not overwrite:
        raise UserError(f"OUT {out}: exists; pass --overwrite to replace it or name another folder")
    if not (out / made_by).is_file() and any(out.iterdir()):
        what = "not a checkpoint" if made_by == TRACKER else f"holds no {made_by}"
        raise UserError(f"OUT {out}: {what}, so --overwrite leaves it alone; name another folder")
    if trained := sorted(path.name for path in out.glob("iter_*")):
        raise UserError(
            f"OUT {out}: training has saved {trained[-1]} there, which --overwrite would lose;"
            " name another folder"
        )


def check_space(out: Path, count: int) -> None:
    """Refuse a disk with less than ``count`` bytes free."""
    free = shutil.disk_usage(existing(out.absolute().parent)).free
    free += sum(map(_own_bytes, _left_behind(out.resolve(), locked=True)))  # which is removed first
    if count > free:
        raise UserError(
            f"OUT {out}: needs {format_bytes(count)} and the disk has {format_bytes(free)}"
            " free; make room or name a folder on another disk"
        )


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the context ends without an exception.

    On any exception it is removed with what it holds and nothing else has changed.

    Raises:
        UserError: another process is making ``out``, or it is there already and ``overwrite`` is not set.
    """
    out = out.resolve()
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock.held(out) as locked:
            _clear(out, locked)
            if out.exists() and not overwrite:
                raise UserError(f"OUT {out}: exists; pass --overwrite to replace it or name another folder")
            partial = out.with_name(f"{_prefix(out)}{os.getpid()}-{socket.gethostname()}")
            try:
                partial.mkdir()
                yield partial
                _sync_folder(partial)
                if overwrite and out.exists():
                    _exchange(partial, out)
                else:
                    _rename_new(partial, out)
                sync(out.parent)
            except BaseException:
                _put_back(out)
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # unfinished, or what was there before
    except BaseException:
        for parent in created:
            with contextlib.suppress(OSError):  # another process has put something there
                parent.rmdir()
        raise


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _clear(out: Path, locked: bool) -> None:
    """Repair and remove what processes that are gone have left beside ``out``.

    Args:
        locked: nobody else on this machine is making ``out``.
    """
    _put_back(out)
    if locked:
        shutil.rmtree(_replaced(out), ignore_errors=True)  # its successor is in place
    for path in _left_behind(out, locked):
        shutil.rmtree(path, ignore_errors=True)


def _left_behind(out: Path, locked: bool) -> list[Path]:
    """Folders that processes which are gone were filling."""
    if not out.parent.is_dir():
        return []
    return [
        path
        for path in out.parent.iterdir()
        if path.name.startswith(_prefix(out))
        and (
            (locked and path.name.endswith(f"-{socket.gethostname()}"))
            or time.time() - _last_change(path) > IDLE_SECONDS
        )
    ]


def _own_bytes(folder: Path) -> int:
    """Bytes of the files that no other folder shares."""
    count = 0
    with contextlib.suppress(FileNotFoundError):  # its process is alive and works in it
        for path in folder.rglob("*"):
            status = path.lstat()
            count += status.st_size * (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
    return count


def _put_back(out: Path) -> None:
    """Give the old folder its name again where a run was killed between the two renames."""
    if _replaced(out).exists() and not out.exists():
        os.rename(_replaced(out), out)


def _last_change(folder: Path) -> float:
    """When something in ``folder`` was last written, in seconds since 1970."""
    latest = 0.0
    with contextlib.suppress(FileNotFoundError):  # its process is alive and works in it
        latest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return latest or time.time()


def _sync_folder(folder: Path) -> None:
    """Flush the files that lie directly in ``folder``, and its entries."""
    for path in folder.iterdir():
        if path.is_file():
            sync(path)
    sync(folder)


def _rename_new(partial: Path, out: Path) -> None:
    try:
        os.rename(partial, out)
    except OSError as error:
        raise UserError(
            f"OUT {out}: appeared while it was being made ({error.strerror}); look at it first"
        ) from None


def _exchange(partial: Path, out: Path) -> None:
    """Put ``partial`` in the place of ``out``; the old ``out`` is then called ``partial``.

    In one step where the file system can. Elsewhere in two renames: between them ``out`` is missing and
    both folders are whole; the next run gives the old one its name back.
    """
    if rename_exchange(partial, out):
        return
    os.rename(out, _replaced(out))
    os.rename(partial, out)
    os.rename(_replaced(out), partial)


def rename_exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    return (
        hasattr(libc, "renameat2")
        and libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0
    )
