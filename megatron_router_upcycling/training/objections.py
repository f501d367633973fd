"""Turn Megatron's errors about a run's arguments or a full disk into one line that names flags.

Its checks are assertions, many without a message. The errors of its writers may not mention the disk.
"""

import contextlib
import errno
import functools
import linecache
import os
import re
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core
from torch.distributed.checkpoint.api import CheckpointException

from megatron_router_upcycling.checkpoint.names import TRACKER
from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.errors import OneRankError, UserError
from megatron_router_upcycling.training.patches import patching

MEGATRON = Path(megatron.core.__file__).parents[1]
BUILDING = re.compile(r"( when instantiating \w+)+$")  # what Megatron appends to an error in build_module
DERIVED = ("world_size", "data_parallel_size")  # arguments that no flag sets
OBJECTIONS = (AssertionError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Setting of Megatron's scheduler -> the argument that it comes from.
OF_SCHEDULER = {
    "init_lr": "lr_warmup_init",
    "max_lr": "lr",
    "lr_warmup_steps": "lr_warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "wsd_decay_steps": "lr_wsd_decay_iters",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
}
SYSTEM_ERROR = re.compile(r"\[Errno (\d+)\]")
NEARLY_FULL = 1 << 20  # bytes of free space below which a failed write is attributed to a full disk


@contextlib.contextmanager
def megatrons_objection(args: Namespace, *, raised_by_megatron: bool = False) -> Iterator[None]:
    """Turn Megatron's objection to ``args`` into a UserError, with the source of a bare assertion.

    Objections are AssertionErrors and ValueErrors. With ``raised_by_megatron``, they are OBJECTIONS raised in
    Megatron's own code, not errors from below it, such as a lack of memory or of a connection.
    """
    try:
        yield
    except OBJECTIONS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if raised_by_megatron:
            built_wrongly = not isinstance(error, TypeError) or "when instantiating" in str(error)
            objects = Path(frame.filename).is_relative_to(MEGATRON) and built_wrongly
        else:
            objects = isinstance(error, AssertionError | ValueError)
        if not objects:
            raise
        said = BUILDING.sub("", " ".join(str(error).split()))
        if not said:
            lines = linecache.getlines(frame.filename)[(frame.lineno or 1) - 1 : frame.end_lineno]
            source = " ".join(" ".join(lines).split())
            said = f"{_values_read_in(source, args)} ({source})"
        raise UserError(f"Megatron refuses these arguments: {_with_flags(said, args)}") from None


def _values_read_in(source: str, args: Namespace) -> str:
    """The arguments that a source line reads, as flags with their values."""
    names = dict.fromkeys(re.findall(r"\b(?:args|self|config)\.(\w+)", source))
    unit = "_samples" if args.train_samples else "_iters"
    arguments = [OF_SCHEDULER[n].replace("_iters", unit) if n in OF_SCHEDULER else n for n in names]
    return ", ".join(f"{flag_of(name)} {getattr(args, name)}" for name in arguments if hasattr(args, name))


def _with_flags(message: str, args: Namespace) -> str:
    """``message`` with argument names replaced by flags, unless they may be other words."""
    return re.sub(
        r"(?<![-\w.'])[a-z]+(?:_[a-z]+)+(?![\w.(])",
        lambda found: flag_of(found[0]) if hasattr(args, found[0]) and found[0] not in DERIVED else found[0],
        message,
    )


def install(args: Namespace) -> None:
    """Turn Megatron's errors during set-up, in the first step and when saving into one line."""
    from megatron.training import training

    for name in ("initialize_megatron", "setup_model_and_optimizer", "train_step"):
        patching.wrap("objections", training, name, functools.partial(_objecting, args))
    for name in ("save_checkpoint", "maybe_finalize_async_save"):
        patching.wrap("objections", training, name, functools.partial(_naming_the_disk, args))


def _objecting(args: Namespace, original: Callable[..., Any], *positional: Any, **options: Any) -> Any:
    is_step = original.__name__ == "train_step"
    if is_step and args.curr_iteration > args.iteration:
        return original(*positional, **options)
    try:
        with megatrons_objection(args, raised_by_megatron=True):
            return original(*positional, **options)
    except UserError as error:  # may be one of ours, to which build_module has appended text
        # Routers and optimizers refuse what they do not support at their first call, on some ranks only.
        kind = OneRankError if is_step else UserError
        raise kind(BUILDING.sub("", str(error))) from None


def _naming_the_disk(args: Namespace, save: Callable[..., Any], *positional: Any, **options: Any) -> Any:
    try:
        return save(*positional, **options)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the latter does not derive from Exception
        if (why := _disk_error(error, Path(args.save))) is None:
            raise
    try:
        last = (Path(args.save) / TRACKER).read_text().strip()
        way_out = f"make room, and the same command resumes from iteration {last}"
    except OSError:
        way_out = "there is no earlier one"
    raise OneRankError(f"--save {args.save}: a checkpoint could not be written ({why}); {way_out}")


def _disk_error(error: BaseException, folder: Path) -> str | None:
    """The system's error message, if a save failed with ``error`` because of the disk; else None."""
    if found := SYSTEM_ERROR.search("".join(traceback.format_exception(error))):
        return os.strerror(int(found[1]))
    try:
        disk = os.statvfs(folder)
    except OSError as gone:
        return gone.strerror
    return os.strerror(errno.ENOSPC) if disk.f_bavail * disk.f_frsize < NEARLY_FULL else None
