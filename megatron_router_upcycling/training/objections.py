"""What Megatron raises about a run's arguments, in one line that names the flags.

Its checks are assertions, many without a message: of the arguments, of the model's configuration, and where
processes, model and optimizer are set up.
"""

import contextlib
import linecache
import re
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core

from megatron_router_upcycling.errors import OneRankError, UserError, reason
from megatron_router_upcycling.training.patches import patching

MEGATRON = Path(megatron.core.__file__).parents[1]
BUILDING = re.compile(r"( when instantiating \w+)+$")  # what Megatron adds to an error on its way
DERIVED = ("world_size", "data_parallel_size")  # arguments that no flag sets
OBJECTIONS = (AssertionError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def megatrons_objection(args: Namespace, *, raised_by_megatron: bool = False) -> Iterator[None]:
    """Megatron's objection to ``args`` in one line; an assertion without a message shows its source.

    Args:
        raised_by_megatron: of OBJECTIONS take those that Megatron itself raises, and not what goes wrong
            below it, such as a lack of memory or of a connection; else AssertionErrors and ValueErrors.
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
            said = f"{_named(source, args)} ({source})"
        raise UserError(f"Megatron refuses these arguments: {_with_flags(said, args)}") from None


def install(args: Namespace) -> None:
    """Let objections that come while processes, model and optimizer are set up be one line."""
    from megatron.training import training

    def objecting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **options: Any) -> Any:
            try:
                with megatrons_objection(args, raised_by_megatron=True):
                    return original(*positional, **options)
            except UserError as error:  # of ours, which went through Megatron's building of modules
                raise UserError(BUILDING.sub("", str(error))) from None

        return call

    def objecting_at_first(step: Callable[..., Any]) -> Callable[..., Any]:
        """Routers and optimizers say what they cannot do when they are first called, on some ranks alone."""

        def call(*positional: Any, **options: Any) -> Any:
            if args.curr_iteration > args.iteration:
                return step(*positional, **options)
            try:
                with megatrons_objection(args, raised_by_megatron=True):
                    return step(*positional, **options)
            except UserError as error:
                raise OneRankError(str(error)) from None

        return call

    for name in ("initialize_megatron", "setup_model_and_optimizer"):
        patching.wrap("objections", training, name, objecting)
    patching.wrap("objections", training, "train_step", objecting_at_first)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _named(source: str, args: Namespace) -> str:
    """The arguments that a line of source reads, as flags with their values."""
    names = dict.fromkeys(name for name in re.findall(r"\b(?:args|self|config)\.(\w+)", source))
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return ", ".join(f"{flag_of(name)} {value}" for name, value in given.items())


def _with_flags(message: str, args: Namespace) -> str:
    """``message`` with flags in place of Megatron's names of arguments, where they cannot be other words."""
    return re.sub(
        r"(?<![-\w.'])[a-z]+(?:_[a-z]+)+(?![\w.(])",
        lambda found: flag_of(found[0]) if hasattr(args, found[0]) and found[0] not in DERIVED else found[0],
        message,
    )


@contextlib.contextmanager
def tokenizer_named(args: Namespace) -> Iterator[None]:
    """What goes wrong where Megatron builds the tokenizer, in one line: its libraries raise anything."""
    try:
        yield
    except Exception as error:
        if not any(frame.name == "build_tokenizer" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: --tokenizer-type {args.tokenizer_type} finds no"
            f" tokenizer there ({reason(error)})"
        ) from None
