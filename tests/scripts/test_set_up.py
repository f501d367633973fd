"""The set-up: which Python scripts/find_python.sh takes, what make says, what the package declares."""

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """A made-up machine: a PATH, a home folder, and Pythons that we put there."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home = folder / "bin", folder / "home"
        self.path.mkdir()
        self.home.mkdir()
        for tool in ("bash", "env"):  # what the script itself needs: no Python, no pyenv, no uv
            (self.path / tool).symlink_to(str(shutil.which(tool)))

    def add(self, path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    def real(self, path: Path) -> Path:
        """A Python that works: the one that runs these tests."""
        return self.add(path, f'exec "{sys.executable}" "$@"')

    def pretending(self, path: Path, version: tuple[int, int], venv: bool = True) -> Path:
        """A Python of another version, or one without what makes virtual environments."""
        hidden = "" if venv else "sys.modules['ensurepip'] = None; "
        start = f"import sys; sys.version_info = {(*version, 0, 'final', 0)}; {hidden}"
        return self.add(path, f'exec "{sys.executable}" -c "{start}exec(sys.argv.pop(1))" "${{@:2}}"')

    def find(self) -> subprocess.CompletedProcess:
        command = [self.path / "bash", ROOT / "scripts" / "find_python.sh"]
        env = {"PATH": str(self.path), "HOME": str(self.home)}
        return subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_a_shim_that_fails_is_passed_over_for_an_inactive_pyenv_version(machine):
    machine.add(machine.path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    machine.pretending(machine.path / "python3", (3, 11))
    machine.pretending(machine.home / ".pyenv/versions/3.9.18/bin/python3", (3, 9))
    python = machine.real(machine.home / ".pyenv/versions/3.12.1/bin/python3")
    assert machine.find().stdout.strip() == str(python)


def test_a_python_without_venv_is_passed_over(machine):
    machine.pretending(machine.path / "python3.12", (3, 12), venv=False)
    python = machine.pretending(machine.path / "python3.13", (3, 13))
    assert machine.find().stdout.strip() == str(python)


def test_the_virtual_environment_that_is_to_be_made_anew_is_passed_over(machine):
    """It may be the active one, and making it clears it first."""
    python = machine.real(machine.path / "python3.12")
    assert machine.find().stdout.strip() == str(python)
    (machine.home / ".venv").symlink_to(sys.prefix)
    assert machine.find().returncode == 2


def test_uv_brings_one_when_there_is_none(machine, tmp_path):
    python = machine.real(tmp_path / "uv" / "python3.12")
    machine.pretending(machine.path / "python3", (3, 11))
    mark = tmp_path / "installed"
    machine.add(
        machine.path / "uv",
        f'case "$*" in "python find --system 3.12") [[ -e {mark} ]] && echo "{python}" ;;'
        f' "python install 3.12") : >{mark} ;; *) exit 2 ;; esac',
    )
    assert machine.find().stdout.strip() == str(python)


def test_a_newer_python_is_the_last_resort(machine):
    newer = machine.pretending(machine.path / "python3", (3, 15))
    assert machine.find().stdout.strip() == str(newer)
    tested = machine.real(machine.home / ".pyenv/versions/3.12.1/bin/python3")
    assert machine.find().stdout.strip() == str(tested)


def test_one_line_says_what_is_missing(machine):
    machine.pretending(machine.path / "python3", (3, 11))
    machine.add(machine.path / "uv", "echo 'no network' >&2; exit 1")
    found = machine.find()
    assert found.returncode == 2 and found.stdout == ""
    last = found.stderr.splitlines()[-1]
    assert last.startswith("error: no Python >= 3.12") and "pyenv install 3.12" in last


def test_the_workflow_runs_what_continuous_integration_and_the_readme_run():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line.removesuffix(" &") for line in lines if line[:4] in ("make", "scri")]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps == commands and len(commands) == 4 and commands[-1].startswith("make test ")
    assert re.search(r"^ *make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_commit_hooks_run_what_is_installed():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        command = [sys.executable, *hook["entry"].split()[1:], __file__]
        assert hook["entry"].startswith(".venv/bin/python -m ruff ") and hook["language"] == "system"
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_requirements():
    """Every tested range holds what is installed; apex is never one: PyPI's package is not NVIDIA's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    gpu = [Requirement(line) for line in extras.pop("gpu")]
    lines = [*project["dependencies"], *itertools.chain(*extras.values())]
    needed = [needed for line in lines if (needed := Requirement(line)).name != project["name"]]
    assert len(needed) >= 18
    assert not [one for one in needed if not one.specifier.contains(version(one.name))]
    names = {one.name.lower() for one in needed + gpu}
    assert {"megatron-core", "transformer-engine"} <= names and "apex" not in names
