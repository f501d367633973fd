"""A disk that fills: the log goes without a line, and a checkpoint that cannot be written says why."""

from pathlib import Path

import pytest

from megatron_router_upcycling.training.run_log import files
from tests import launch


def test_a_run_outlives_its_log_and_says_why_it_cannot_save(disk: Path, moe: Path, moe_config: Path) -> None:
    save = disk / "run"
    save.mkdir()
    (save / files.ROUTING).symlink_to("/dev/full")
    command = ("--config", moe_config, "--load", moe, "--save", save, "--train-iters", 2)
    output = launch.ranks(1, "pretrain", *command)
    assert output.returncode == 2 and "Traceback (most recent call last)" not in output.text
    lost = f"{save / files.ROUTING}: the line of iteration %d could not be written (No space left on device)"
    assert all(lost % iteration in output.text for iteration in (1, 2)) and len(output.losses) == 2
    assert output.errors == [
        f"error: --save {save}: a checkpoint could not be written (No space left on device); there is no"
        " earlier one"
    ]
    assert [line["iteration"] for line in files.read(save / files.RUN)][:2] == [1, 2]


def test_a_line_that_does_not_fit_leaves_none(disk: Path) -> None:
    path, filler = disk / "run.jsonl", disk / "filler"
    files.append(path, {"iteration": 1})
    with pytest.raises(OSError):
        filler.write_bytes(bytes(8 << 20))
    with pytest.raises(OSError):
        files.append(path, {"iteration": 2, "load": ["x" * 8192]})
    filler.unlink()
    files.append(path, {"iteration": 3})
    assert [line["iteration"] for line in files.read(path)] == [1, 3]
    assert path.read_text().count("\n") == 2
