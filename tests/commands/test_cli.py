"""``router-upcycle`` itself: help, and how a command ends."""

import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from typing import Any, NoReturn

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.errors import UserError
from tests.launch import ENVIRONMENT

COMMANDS = ("prepare-data", "import-hf", "convert", "export-hf")
COMMANDS += ("verify", "inspect", "report", "evaluate", "plan")
SLOW = {"torch", "numpy", "matplotlib", "jinja2", "transformers", "megatron", "safetensors", "tqdm"}


def help_of(*command: str) -> str:
    """What ``--help`` prints, in a process that must not have imported anything slow."""
    code = (
        "import sys\nfrom megatron_router_upcycling import cli\n"
        f"try: cli.main({[*command, '--help']})\nexcept SystemExit: pass\n"
        f"assert not {SLOW} & set(sys.modules), {SLOW} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_the_commands() -> None:
    assert re.findall(r"^    ([a-z]\S+)", help_of(), re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches_and_imports_nothing_slow(command: str) -> None:
    said = help_of(command)
    assert max(map(len, said.split("\n\n")[1].splitlines())) <= 80  # wrapped; examples are not
    examples = said[said.index("\nexample") :].replace("\\\n", " ").splitlines()
    own = [shlex.split(line) for line in examples if line.startswith("  router-upcycle ")]
    assert any(words[1] == command for words in own)
    for words in own:
        cli.parse([word for word in words[1:] if not word.startswith("[")])


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("--flag: no\nsuch thing"), 2, "error: --flag: no\\nsuch thing\n"),
        (KeyboardInterrupt("2 of 3 are here"), 130, "interrupted; 2 of 3 are here\n"),
        (signal.SIGTERM, 143, "interrupted; nothing was left behind\n"),
    ],
)
def test_how_a_command_ends(monkeypatch: Any, capsys: Any, raised: Any, status: int, said: str) -> None:
    def run(args: Namespace) -> NoReturn:
        if isinstance(raised, signal.Signals):
            signal.raise_signal(raised)
        raise raised

    monkeypatch.setattr(cli, "parse", lambda argv: Namespace(run=run))
    assert cli.main([]) == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a command; router-upcycle --help lists them"),
        (["convrt"], "argument COMMAND: invalid choice: 'convrt'"),
        (["verify", "a", "b", "--quit"], "unrecognized arguments: --quit; did you mean --quiet?"),
        (["verify", "a", "b", "--xyz"], "unrecognized arguments: --xyz; see router-upcycle verify --help"),
        (["verify", "s3://bucket/dense", "b"], "s3://bucket/dense: URLs are not supported"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
