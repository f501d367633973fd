"""A folder that appears whole or not at all.

It is filled under a hidden name beside its place, flushed, and renamed. What a killed run has left
behind never looks like the folder, and the next run removes it.
"""

import contextlib
import ctypes
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_router_upcycling.checkpoint.torch_dist import TRACKER
from megatron_router_upcycling.checkpoint.writer import sync
from megatron_router_upcycling.errors import UserError

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def check_target(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse a place for ``out`` where something would be lost. Touches nothing.

    Raises:
        UserError: it exists and ``overwrite`` is not set, is no checkpoint or one that training has
            saved to, or it and the checkpoint ``source`` lie one inside the other.
    """
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"OUT {out}: is, holds or lies in DENSE {source}; name a folder beside it")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"OUT {out}: exists and is not a folder; name another")
    if not overwrite:
        raise UserError(f"OUT {out}: exists; pass --overwrite to replace it or name another folder")
    if not (out / TRACKER).is_file() and any(out.iterdir()):
        raise UserError(f"OUT {out}: not a checkpoint, so --overwrite leaves it alone; name another folder")
    if trained := sorted(path.name for path in out.glob("iter_*")):
        raise UserError(
            f"OUT {out}: training has saved {trained[-1]} there, which --overwrite would lose;"
            " name another folder"
        )


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the context ends without an exception.

    On any exception, Ctrl-C among them, it is removed with what it holds and nothing else has changed.
    """
    created = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(out, "partial", os.getpid())
    _remove_stale(out)
    try:
        partial.mkdir()
        yield partial
        sync(partial)
        if overwrite and out.exists():
            _exchange(partial, out)
        else:
            _rename_new(partial, out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):  # another process has put something there
                parent.rmdir()
        raise
    shutil.rmtree(partial, ignore_errors=True)  # what was there before, after an exchange


def _hidden(out: Path, kind: str, pid: int | str) -> Path:
    # A process number means something on one machine only; the folder may be shared by many.
    return out.with_name(f".{out.name}.{kind}-{pid}-{socket.gethostname()}")


def _remove_stale(out: Path) -> None:
    """Remove what processes of this machine that are gone have left beside ``out``."""
    pattern = _hidden(Path(out.name), "partial", "*").name
    prefix, suffix = pattern.split("*")
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(prefix).removesuffix(suffix)
        if path.name == f"{prefix}{pid}{suffix}" and pid.isdecimal() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _rename_new(partial: Path, out: Path) -> None:
    try:
        os.rename(partial, out)
    except OSError as error:
        raise UserError(
            f"OUT {out}: appeared while it was being made ({error.strerror}); look at it first"
        ) from None


def _exchange(partial: Path, out: Path) -> None:
    """Put ``partial`` in the place of ``out`` in one step; the old ``out`` is then called ``partial``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = os.fsencode(partial), os.fsencode(out)
        if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
            return
    # A file system that cannot exchange: two renames, the old folder being kept until both are done.
    old = _hidden(out, "replaced", os.getpid())
    os.rename(out, old)
    try:
        os.rename(partial, out)
    except BaseException:
        os.rename(old, out)
        raise
    os.rename(old, partial)
