"""``router-upcycle convert`` and ``inspect`` as commands: what they print, refuse and leave behind."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats
from tests.launch import ENVIRONMENT

COMMAND = (sys.executable, "-m", "megatron_router_upcycling.cli")
TIMEOUT = 60  # seconds


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    dense_checkpoint.write(tmp_path / "dense")
    make_stats(tmp_path / "ks")
    return tmp_path / "dense"


def convert(folder: Path, *flags: object) -> int:
    return cli.main(["convert", str(folder / "dense"), str(folder / "moe"), *map(str, flags)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_says_what_was_made_and_what_comes_next(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path, "--key-stats", tmp_path / "ks", "--num-experts", 4) == 0
    said = capsys.readouterr().out
    assert "4 experts and a router made of attention heads, in 4 groups" in said
    assert "softmax, then top-k (--moe-router-pre-softmax)" in said and "less than the whole weight" in said
    assert f"--load {tmp_path / 'moe'}" in said
    assert (tmp_path / "moe/latest_checkpointed_iteration.txt").read_text() == "release"

    assert convert(tmp_path, "--router", "linear", "--no-moe-router-pre-softmax", "--overwrite") == 0
    said = capsys.readouterr().out
    assert "8 experts and a linear router" in said and "exactly the dense model" in said
    record = manifest.read(tmp_path / "moe")
    assert record is not None and record["router"]["router"] == "linear" and record["key_stats"] is None

    assert convert(tmp_path, "--router", "linear", "--overwrite", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_writes_nothing(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path, "--key-stats", tmp_path / "ks", "--num-experts", 4, "--dry-run") == 0
    said = capsys.readouterr().out
    # A layer's queries, keys and values are 64 x 32 float32 values, its router 4 x 8 x 32 and 4 x 8.
    assert "with at most 0.03 MB of the model in memory" in said
    assert "linked, not written" in said and "decoder.layers.mlp.router.query_weight [3, 4, 8, 32]" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ks"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--key-stats", "ks", "--num-experts", 4, "--top-k", 5), "--top-k 5: must be between 1 and"),
        (
            ("--router", "linear", "--top-k", 1, "--no-moe-router-pre-softmax"),
            "--top-k 1 with --no-moe-router-pre-softmax: the weight of a token's only expert is always 1",
        ),
        (
            ("--router", "linear", "--config", "groups.yaml"),
            "moe_router_group_topk 4: --top-k 2 experts must come from as many of the 4 groups of 2 experts",
        ),
        (("--key-stats", "ks", "--num-experts", 0), "--num-experts 0: must be at least 1"),
        (("--key-stats", "ks", "--num-routers", 3), "--num-routers 3: does not fit 8 attention heads"),
        (("--key-stats", "ks", "--num-experts", 5), "--num-experts 5, and as many routers: does not fit 8"),
        (("--num-experts", 4), "--key-stats: --router mixture needs the file that collect_keys wrote"),
        (("--key-stats", "none"), "--key-stats none: no such file"),
        (("--key-stats", "damaged"), "--key-stats damaged: cannot be read"),
        (("--key-stats", "nan"), "--key-stats nan: key_mean holds NaN"),
        (("--router", "best"), "argument --router: invalid choice: 'best'"),
        (("--num-expert", 4), "unrecognized arguments: --num-expert"),
        (("--num-experts", "many"), "argument --num-experts: invalid int value: 'many'"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    tmp_path: Path,
    dense: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_bytes(b"damaged")
    (tmp_path / "groups.yaml").write_text("moe_router_num_groups: 4\nmoe_router_group_topk: 4\n")
    stats = make_stats(tmp_path / "nan")
    from megatron_router_upcycling.key_statistics import file as key_stats_file

    stats.mean[0, 0, 0] = torch.nan
    key_stats_file.save(tmp_path / "nan", stats, overwrite=True)
    assert convert(tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("dense", "is, holds or lies in DENSE"),
        ("dense/moe", "is, holds or lies in DENSE"),
        (".", "is, holds or lies in DENSE"),
        ("ks", "exists and is not a folder"),
        ("taken", "exists; pass --overwrite"),
        ("ks/moe", "cannot be written"),
    ],
)
def test_out_that_cannot_be_made(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "taken").mkdir()
    before = contents(tmp_path)
    assert cli.main(["convert", str(dense), str(tmp_path / out), "--router", "linear"]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda out: (out / "thesis.tex").write_text("x"),
            "holds no latest_checkpointed_iteration.txt, so --overwrite leaves it alone",
        ),
        (
            lambda out: shutil.copytree(out.parent / "dense", out, dirs_exist_ok=True),
            "has saved iter_0000008",
        ),
    ],
)
def test_overwrite_leaves_alone_what_convert_did_not_make(
    tmp_path: Path,
    dense: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    message: str,
) -> None:
    (tmp_path / "moe").mkdir()
    make(tmp_path / "moe")
    before = contents(tmp_path)
    assert convert(tmp_path, "--router", "linear", "--overwrite") == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_too_small_a_disk_is_known_beforehand(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert convert(tmp_path, "--router", "linear") == 2
    assert "the disk has 0.00 MB free" in capsys.readouterr().err


def run_limited(folder: Path, *flags: str, bytes_a_file: int) -> subprocess.CompletedProcess[str]:
    """Convert where no file may grow beyond ``bytes_a_file``."""
    return subprocess.run(
        [*COMMAND, "convert", folder / "dense", folder / "moe", "--router", "linear", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file)),
    )


def test_failed_write_leaves_the_old_output_and_nothing_else(tmp_path: Path, dense: Path) -> None:
    assert convert(tmp_path, "--router", "linear", "--quiet") == 0
    before = contents(tmp_path)
    done = run_limited(tmp_path, "--overwrite", "--quiet", bytes_a_file=20_000)
    assert done.returncode == 2
    assert done.stderr.startswith("error: OUT") and done.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in done.stderr
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(
    dense: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--router", "linear", "--num-experts", "64", "--materialize", "--quiet"]
    command = ["convert", str(dense), str(small_disk / "new/moe"), *flags]
    assert cli.main(command) == 2
    assert "and the disk has 0.61 MB free" in capsys.readouterr().err
    free = type("Usage", (), {"free": 1 << 40})()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)  # another process fills it meanwhile
    assert cli.main(command) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


def start_long_run(folder: Path) -> subprocess.Popen[str]:
    """Start a conversion that takes seconds to write; return once it is writing."""
    flags = ("--router", "linear", "--num-experts", "3000", "--materialize", "--quiet")
    process = subprocess.Popen(
        [*COMMAND, "convert", folder / "dense", folder / "moe", *flags],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in a shell's background, Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + TIMEOUT
    while not any(path.stat().st_size for path in folder.glob(".moe.partial-*/release/__upcycled_0.distcp")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (folder / "moe").exists()
    return process


def test_killed_run_leaves_nothing_whole_and_stands_in_no_ones_way(tmp_path: Path, dense: Path) -> None:
    process = start_long_run(tmp_path)
    process.kill()
    process.communicate()
    assert not (tmp_path / "moe").exists()
    (left,) = tmp_path.glob(".moe.partial-*")
    assert not (left / "latest_checkpointed_iteration.txt").exists()
    assert convert(tmp_path, "--router", "linear", "--quiet") == 0
    open_checkpoint(tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ks", "moe"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_that_refuses_a_second_one_and_when_interrupted_removes_what_it_made(
    tmp_path: Path,
    dense: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    process = start_long_run(tmp_path)
    assert convert(tmp_path, "--router", "linear", "--quiet") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: OUT") and said.count("\n") == 1 and str(process.pid) in said
    assert len(list(tmp_path.glob(".moe.partial-*"))) == 1  # the first one's, left alone
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status
    assert said == "interrupted; nothing was left behind\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ks"]


def test_inspect(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(dense)]) == 0
    said = capsys.readouterr().out
    assert "dense, iteration 8" in said and "hidden_size 32" in said and "num_query_groups 4" in said
    assert "decoder.layers.mlp.linear_fc1.weight" in said and "[3, 48, 32]" in said and "18,432" in said
    assert convert(tmp_path, "--router", "linear", "--num-experts", 4, "--quiet") == 0
    assert cli.main(["inspect", str(tmp_path / "moe")]) == 0
    said = capsys.readouterr().out
    assert "Mixture-of-Experts, 4 experts" in said and "moe_router_topk 2" in said
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in said and "[3, 4, 48, 32]" in said
    assert "router_upcycling.json" in said and '"shared_storage": true' in said
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
