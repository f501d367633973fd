"""What documents, comments and scripts mention exists: files, modules, commands, headings, make targets."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.errors import Parser
from tests.repository import PACKAGE, ROOT, repository_files

ROOTS = ("configs", "docs", "examples", "megatron_router_upcycling", "scripts", "tests", "tools")
SUFFIXES = "py|md|yaml|yml|sh|sbatch|html|png|toml|c"
# A path below one of ROOTS, or with a slash and a known suffix, which may be below the package.
FROM_ROOT = re.compile(rf"(?<![\w./-])(?:{'|'.join(ROOTS)})/[\w.*/-]*")
SHORT = re.compile(rf"(?<![\w./$-])[a-z_]\w*(?:/[\w.-]+)*/[\w.*-]+\.(?:{SUFFIXES})\b(?!\()")
BARE = re.compile(r"`([a-z_]+\.(?:py|sh|sbatch))`")  # in a document: the name of some file
MODULE = re.compile(rf"-m ({PACKAGE}(?:\.\w+)*|(?:tools|tests|examples)(?:\.\w+)+)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
# What is named and is not here: Megatron-LM's own, and what a command makes.
ELSEWHERE = {"tools/preprocess_data.py", "pretrain_gpt.py"}
MADE = ("demo/", "compare/", "bench/", "evaluation/NAME", "ckpt/", "runs/", "DENSE/", "moe/", "run/")


def mentioning() -> list[Path]:
    """The text files that speak of others, tests aside (they make files up)."""
    suffixes = (".md", ".py", ".sh", ".sbatch", ".yaml", ".yml", ".toml")
    files = [file for file in repository_files() if file.parts[0] != "tests"]
    return [file for file in files if file.suffix in suffixes or file.name in ("Makefile", "run")]


def exists(mention: str, file: Path) -> bool:
    """Whether the path is there: from the root, from the package, or from the file's own folder."""
    mention = mention.rstrip("/.")
    for base in (ROOT, ROOT / PACKAGE, (ROOT / file).parent):
        if (base / mention).exists() or ("*" in mention and any(base.glob(mention))):
            return True
    # `configs/methods/NAME` and the like stand for any file there.
    return Path(mention).name.isupper() and (ROOT / mention).parent.is_dir()


def wrong_mentions(file: Path, text: str) -> Iterator[str]:
    is_document = file.suffix == ".md"
    for mention in FROM_ROOT.findall(text) + (SHORT.findall(text) if is_document else []):
        if not (mention in ELSEWHERE or mention.startswith(MADE) or exists(mention, file)):
            yield mention
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or path.is_dir()):
            yield f"-m {module}"
    names = {other.name for other in repository_files()} | ELSEWHERE
    yield from (name for name in BARE.findall(text) if is_document and name not in names)


def test_paths_and_modules_exist() -> None:
    files = mentioning()
    assert {"README.md", "CONTRIBUTING.md", "Makefile", "setup.sh"} <= {file.name for file in files}
    for file in files:
        wrong = list(wrong_mentions(file, (ROOT / file).read_text(encoding="utf-8")))
        assert not wrong, f"{file} names {wrong}"
    invented = "see `checkpoint/shard.py`, `tools/nothing.py` and tools/experiments/demo.py"
    assert set(wrong_mentions(Path("README.md"), invented)) == {"checkpoint/shard.py", "tools/nothing.py"}


DOCUMENTS = [file for file in mentioning() if file.suffix == ".md"]


def headings(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_links_lead_somewhere(file: Path) -> None:
    assert headings("# A b: c\n```\n# not one\n```\n") == {"a-b-c"}
    for target, anchor in LINK.findall((ROOT / file).read_text(encoding="utf-8")):
        path = (ROOT / file).parent / target if target else ROOT / file
        assert path.exists(), f"{file} links to {target}"
        assert not anchor or anchor in headings(path.read_text("utf-8")), f"{file} links to {target}#{anchor}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_commands_and_their_flags_exist(file: Path) -> None:
    commands = cli.add_commands(Parser())
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"router-upcycle ([a-z][a-z-]+)((?: [^`\n]*)?)", text)
    for name, _ in found:
        assert name in commands, f"{file} names router-upcycle {name}"
    found += re.findall(rf"`({'|'.join(commands)})( [^`\n]*)`", text.replace("\n", " "))
    for name, rest in found:
        parser = commands[name]
        if not parser.get_default("takes_megatron_flags"):
            given = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest.split("#")[0]))
            assert given <= set(parser._option_string_actions), f"{file}: router-upcycle {name} {rest}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE))
    assert named <= targets, f"{file} names make {named - targets}"


def test_the_tree_in_contributing_is_there() -> None:
    """Of "What is where"; what is indented lies in the package."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"## What is where\n+```\n(.*?)```", page, re.DOTALL)
    assert block
    entries = set()
    for line in block[1].splitlines():
        folder = f"{PACKAGE}/" if line.startswith(" ") else ""
        entries |= {folder + name for name in re.split(r"  +", line.strip())[0].split(", ")}
    assert not [entry for entry in entries if not (ROOT / entry).exists()]
    rooms = {f"{PACKAGE}/{path.parent.name}/" for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert not (rooms | {f"{name}/" for name in ROOTS}) - entries
