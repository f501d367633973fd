"""``router-upcycle convert`` and ``inspect`` as commands: what they print, refuse and leave behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.key_statistics import file as key_stats_file
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    dense_checkpoint.write(tmp_path / "dense")
    make_stats(tmp_path / "ks")
    return tmp_path / "dense"


def convert(folder: Path, *flags: object) -> int:
    return cli.main(["convert", str(folder / "dense"), str(folder / "moe"), *map(str, flags)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_says_what_was_made_and_what_comes_next(tmp_path: Path, dense: Path, capsys: Any) -> None:
    assert convert(tmp_path, "--key-stats", tmp_path / "ks", "--num-experts", 4) == 0
    said = capsys.readouterr().out
    assert "4 experts and a mixture of 4 routers from attention heads" in said
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
            "moe_router_group_topk 4: --top-k 2 of 8 experts cannot come from 4 of moe_router_num_groups 4",
        ),
        (("--key-stats", "ks", "--num-experts", 0), "--num-experts 0: must be at least 1"),
        (("--key-stats", "ks", "--num-routers", 3), "--num-routers 3: does not fit 8 attention heads"),
        (("--key-stats", "ks", "--num-experts", 5), "--num-experts 5, and as many routers: does not fit 8"),
        (("--num-experts", 4), "--key-stats: --router mixture needs the file that collect_keys wrote"),
        (("--key-stats", "none"), "--key-stats none: no such file"),
        (("--key-stats", "damaged"), "--key-stats damaged: cannot be read"),
        (("--key-stats", "nan"), "--key-stats nan: key_mean holds NaN"),
        (("--router", "best"), "argument --router: invalid choice: 'best'"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    tmp_path: Path, dense: Path, monkeypatch: Any, capsys: Any, flags: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_bytes(b"damaged")
    (tmp_path / "groups.yaml").write_text("moe_router_num_groups: 4\nmoe_router_group_topk: 4\n")
    stats = make_stats(tmp_path / "nan")
    stats.mean[0, 0, 0] = torch.nan
    key_stats_file.save(tmp_path / "nan", stats, overwrite=True)
    assert convert(tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("dense/moe", "is, holds or lies in DENSE"),
        (".", "is, holds or lies in DENSE"),
        ("ks", "exists and is not a folder"),
        ("taken", "exists; pass --overwrite"),
        ("ks/moe", "cannot be written"),
    ],
)
def test_out_that_cannot_be_made(tmp_path: Path, dense: Path, capsys: Any, out: str, message: str) -> None:
    (tmp_path / "taken").mkdir()
    before = contents(tmp_path)
    assert cli.main(["convert", str(dense), str(tmp_path / out), "--router", "linear"]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_overwrite_leaves_alone_what_convert_did_not_make(tmp_path: Path, dense: Path, capsys: Any) -> None:
    out = tmp_path / "moe"
    shutil.copytree(dense, out)
    for message in ("has saved iter_0000008", "so --overwrite leaves it alone"):
        before = contents(tmp_path)
        assert convert(tmp_path, "--router", "linear", "--overwrite") == 2
        assert message in capsys.readouterr().err and contents(tmp_path) == before
        shutil.rmtree(out)
        out.mkdir()
        (out / "thesis.tex").write_text("x")


def test_too_small_a_disk_is_known_beforehand(
    tmp_path: Path, dense: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert convert(tmp_path, "--router", "linear") == 2
    assert "the disk has 0.00 MB free" in capsys.readouterr().err


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
