"""The exceptions that end a command: a user's mistake (and a parser of flags that raises it), and SIGTERM."""

import argparse
from typing import Any, NoReturn

LONGEST = 1000  # characters of a message: names and values in it may come from a hostile file


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: it names the flag or file and says what would work. Every command line
    entry prints it as ``error: MESSAGE`` on stderr, without a traceback, and exits with status 2. Line
    ends and control characters in names that it repeats are shown as escapes. Any function that reads what a
    user gave may raise it; a docstring lists it only where it says more than that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OneRankError(UserError):
    """A UserError that not every rank sees: the first that does has to print it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds and says what is left as Ctrl-C does."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def printable(text: str, longest: int = LONGEST) -> str:
    """``text`` as one line that a terminal can show, its middle left out where it is long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value from a file, for a message or a table: a number or name; of anything else its kind."""
    if isinstance(value, str):
        return printable(value, 100)
    if isinstance(value, bool | int | float | None):
        return str(value)
    return f"({type(value).__name__})"


def reason(error: BaseException) -> str:
    """What ``error`` says, for a message; its kind where it says nothing."""
    return printable(" ".join(str(error).split()), 200) or type(error).__name__


def described(error: BaseException) -> str:
    """The kind of ``error`` and what it says, for a message about one of another library."""
    return f"{type(error).__name__}: {reason(error)}"
