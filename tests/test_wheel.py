"""The wheel that ``pip install .`` and ``python -m build`` make: whole, and enough to run the commands."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests import dense_checkpoint, launch
from tests.repository import PACKAGE, ROOT, repository_files

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, in which an earlier build has left nothing, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for file in repository_files():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    compiled = source / PACKAGE / "hf" / "__pycache__" / "left.cpython-312.pyc"
    compiled.parent.mkdir()
    compiled.touch()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    subprocess.run([*PIP, "wheel", *options, source], check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's package and command in a folder of their own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", folder)
    subprocess.run([*PIP, "install", *options, wheel], check=True, timeout=120)
    return folder


def test_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {str(file) for file in repository_files() if file.parts[0] == PACKAGE}
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/evaluation/tasks/stdlib.yaml"} <= held


def test_its_commands_work_without_this_checkout(installed: Path, tmp_path: Path) -> None:
    def python(*words: object) -> str:
        """What Python prints that takes this package from ``installed``, and nothing from this checkout."""
        environment = {"PYTHONPATH": str(installed)}
        return launch.run(sys.executable, *words, timeout=120, cwd=tmp_path, **environment).ok().text

    where = python("-c", f"import {PACKAGE} as p; print(p.__file__)")
    assert where.strip() == str(installed / PACKAGE / "__init__.py")
    dense, moe, keys, config = (tmp_path / name for name in ("dense", "moe", "keys.safetensors", "moe.yaml"))
    dense_checkpoint.write(dense)
    dense_checkpoint.make_stats(keys)
    batch = {"seq_length": 32, "micro_batch_size": 1, "global_batch_size": 8}
    config.write_text(yaml.safe_dump(batch | {"vocab_size": dense_checkpoint.VOCABULARY}))
    (tmp_path / "run").mkdir()
    line = {"kind": "training", "iteration": 1, "lm_loss": 4.0, "tokens": 256, "learning_rate": 1e-3}
    (tmp_path / "run" / "run.jsonl").write_text(json.dumps(line | {"grad_norm": 1.0, "time": 0.0}) + "\n")

    command = installed / "bin" / "router-upcycle"
    for words, said in (
        (("--help",), "convert"),
        (("convert", dense, moe, "--key-stats", keys), "8 experts"),
        (("verify", dense, moe), "as it must be"),
        (("inspect", moe), "8 experts"),
        (("plan", config, "--load", moe, "--gpus", 8), "GPU"),
        (("report", tmp_path / "run", "--output", tmp_path / "report"), "report.html"),
    ):
        assert said in python(command, *words)
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000
