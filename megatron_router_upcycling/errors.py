"""The exceptions that end a command, and what raises them for a parser of flags and for the disk."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

LONGEST = 1000  # characters of a message: names and values in it may come from a hostile file

type Kinds = type[Exception] | tuple[type[Exception], ...]


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line that names the flag or file and says what would work. Every command prints it as
    ``error: MESSAGE`` on stderr and exits with status 2. Any function that reads user input may raise it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OneRankError(UserError):
    """A UserError that only some ranks raise: the first of them prints it, not rank 0."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


class _Help(argparse.HelpFormatter):
    """Wraps single-line texts, keeps multi-line texts unchanged, and shows the defaults of flags."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, bool | list | None) or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are UserErrors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def printable(text: str, longest: int = LONGEST) -> str:
    """``text`` as one line without control characters; a long text loses its middle."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value from a file, for a message or table: a number or string as text, anything else by its type."""
    if isinstance(value, str):
        return printable(value, 100)
    return str(value) if isinstance(value, bool | int | float | None) else f"({type(value).__name__})"


def reason(error: BaseException) -> str:
    """The text of ``error``, for a message; its type if it has no text."""
    return printable(" ".join(str(error).split()), 200) or type(error).__name__


def described(error: BaseException) -> str:
    """The type and text of another library's ``error``, for a message."""
    return f"{type(error).__name__}: {reason(error)}"


@contextlib.contextmanager
def error_as(kinds: Kinds, fault: str, way_out: str = "", say: Callable[..., str] = reason) -> Iterator[None]:
    """Turn an error of ``kinds`` within into a UserError of ``fault``, ``say(error)`` and ``way_out``."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{fault} ({say(error)}){way_out}") from None


def os_error_as(fault: str, way_out: str = "") -> AbstractContextManager[None]:
    """``error_as`` for OSErrors, with the system's reason."""
    return error_as(OSError, fault, way_out, lambda error: error.strerror or reason(error))
