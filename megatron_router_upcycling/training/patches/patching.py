"""Wrap or replace a symbol of Megatron or PyTorch; if it has gone, the error names it and its user."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

TESTED = "0.19"


@contextlib.contextmanager
def without(**unused: bool) -> Iterator[None]:
    """What is imported meanwhile takes the ``unused`` packages as not installed, as Megatron allows."""
    with contextlib.ExitStack() as afterwards:
        for package in {name for name, is_unused in unused.items() if is_unused} - sys.modules.keys():
            sys.modules[package] = None  # type: ignore[assignment]
            afterwards.callback(sys.modules.pop, package)
        yield


def changed(by: str, what: str) -> RuntimeError:
    """The error for an upstream symbol that has changed in a way that breaks ``by``."""
    known = f"tested with megatron-core {TESTED}; install megatron-core {TESTED}, or report it"
    return RuntimeError(f"{by}: {what} in this version of megatron-core or torch; {known}")


def find(by: str, owner: Any, name: str, *, place: str = "", reads: Iterable[str] = ()) -> Any:
    """``owner.name``, after checking that it exists and, as a function, has the parameters ``reads``."""
    where = f"{place or getattr(owner, '__name__', repr(owner))}.{name}"
    # A class of Megatron's must define the method itself: an inherited one does something else.
    own_only = inspect.isclass(owner) and owner.__module__.startswith("megatron.")
    if name not in vars(owner) if own_only else not hasattr(owner, name):
        raise changed(by, f"{where} does not exist")
    found = getattr(owner, name)
    if missing := [read for read in reads if read not in inspect.signature(found).parameters]:
        raise changed(by, f"{where}({', '.join(missing)}) does not exist")
    return found


def replace(by: str, owner: Any, name: str, new: Any) -> None:
    """Replace ``owner.name`` by ``new`` until the process ends."""
    find(by, owner, name)
    setattr(owner, name, new)


def wrap(by: str, owner: Any, name: str, outer: Callable[..., Any], reads: Iterable[str] = ()) -> None:
    """Make ``owner.name(...)`` call ``outer(original, ...)`` from now on; a second call changes nothing."""
    original = find(by, owner, name, reads=reads)
    if getattr(original, "wrapped_by", None) == by:
        return

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return outer(original, *args, **kwargs)

    call.wrapped_by = by  # type: ignore[attr-defined]
    setattr(owner, name, call)
