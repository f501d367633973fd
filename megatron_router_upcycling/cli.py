"""``router-upcycle``: the commands that run in one process, without Megatron.

Torch is imported only after the arguments were checked, so that ``--help`` and usage errors are immediate.
"""

import argparse
import difflib
import gc
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_router_upcycling import __version__
from megatron_router_upcycling.commands import (
    convert,
    evaluate,
    export_hf,
    import_hf,
    inspect,
    plan,
    prepare_data,
    report,
    verify,
)
from megatron_router_upcycling.errors import Parser, Terminated, UserError

COMMANDS = (prepare_data, import_hf, convert, export_hf, verify, inspect, report, evaluate, plan)


class _Parser(Parser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", Path, _local_path)


def _local_path(text: str) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise argparse.ArgumentTypeError(f"{text}: URLs are not supported; copy it to a disk, or mount it")
    return Path(text)


def add_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Add the commands to ``parser`` and return their parsers by name.

    A command module's docstring is its help: title, description, and an epilog that starts with examples.
    """
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        title, description, epilog = str(module.__doc__).split("\n\n", 2)
        command = commands.add_parser(
            name, help=title, description=description.replace("\n", " "), epilog=epilog
        )
        module.add_flags(command)
        command.set_defaults(run=module.run)
    return commands.choices


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments, its function ``run`` and, if the command takes them, Megatron's flags."""
    parser = _Parser(
        prog="router-upcycle",
        description="Turn a dense Megatron checkpoint into a Mixture-of-Experts by Router Upcycling.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = add_commands(parser)
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.error("name a command; router-upcycle --help lists them")
    if rest and not getattr(args, "takes_megatron_flags", False):
        near = difflib.get_close_matches(rest[0], commands[args.command]._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see router-upcycle {args.command} --help"
        parser.error(f"unrecognized arguments: {' '.join(rest)}; {hint}")
    args.megatron_flags = rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 if ``verify`` finds a difference, 2 after a user's
    mistake, 130 or 143 when interrupted."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    gc.set_threshold(100_000)  # importing torch makes no garbage; looking for it takes a tenth of the time
    try:
        args = parse(argv)
        return args.run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:
        print(f"interrupted; {str(interrupted) or 'nothing was left behind'}", file=sys.stderr)
        return 143 if isinstance(interrupted, Terminated) else 130
    except BrokenPipeError:  # `router-upcycle inspect … | head`
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
