"""A checkpoint that could not be written: why, in the last line that a run prints.

Megatron's writers report a full or broken disk in the middle of their logs and raise something else.
"""

import errno
import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_router_upcycling.checkpoint.format.files import TRACKER
from megatron_router_upcycling.errors import OneRankError, UserError
from megatron_router_upcycling.training.patches import patching

LOGGED = re.compile(r"\[Errno (\d+)\]")
LITTLE = 1 << 20  # bytes of free space below which a failed write is taken to be a full disk


def install(args: Namespace) -> None:
    """Wrap what saves, and what waits for a save in the background, in ``megatron.training.training``."""
    from megatron.training import training

    def wrapper(save: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **options: Any) -> Any:
            with errors_logged() as logged:
                try:
                    return save(*positional, **options)
                except UserError:
                    raise
                except (Exception, CheckpointException) as error:  # the latter is no Exception
                    if (why := disk_error(error, logged, Path(args.save))) is None:
                        raise
                    way_out = _last(Path(args.save))
                    raise OneRankError(
                        f"--save {args.save}: a checkpoint could not be written ({why}); {way_out}"
                    ) from None

        return call

    for name in ("save_checkpoint", "maybe_finalize_async_save"):
        patching.wrap("saving", training, name, wrapper)


def disk_error(error: BaseException, logged: list[str], folder: Path) -> str | None:
    """What the system said of the disk, if that is why ``error`` was raised.

    Args:
        logged: the errors that were logged meanwhile.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    for text in (*logged, str(error)):
        if found := LOGGED.search(text):
            return os.strerror(int(found[1]))
    try:
        disk = os.statvfs(folder)
    except OSError as gone:
        return gone.strerror
    return os.strerror(errno.ENOSPC) if disk.f_bavail * disk.f_frsize < LITTLE else None


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """The errors that are logged meanwhile, by any library."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Keep(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger().removeHandler(handler)


def _last(save: Path) -> str:
    try:
        whole = (save / TRACKER).read_text().strip()
    except OSError:
        return "there is no earlier one"
    return f"make room, and the same command resumes from iteration {whole}"
