"""Experts that would stay equal are named by every command that meets them before training."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli, pretrain
from megatron_router_upcycling.diagnostics import routing_start
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.likeness import tied_experts
from megatron_router_upcycling.training.launch import Run
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats


def convert(folder: Path, *flags: object) -> int:
    command = ("convert", folder / "dense", folder / "moe", "--key-stats", folder / "ks", "--overwrite")
    return cli.main([str(part) for part in (*command, *flags)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense_checkpoint.write(tmp_path / "dense")  # 8 heads in 4 query groups
    make_stats(tmp_path / "ks")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (("--head-key", "mean"), "convert again with --head-key attended"),
        (("--num-experts", 16, "--num-routers", 8), "convert again with --num-routers 16"),
    ],
    ids=["shared keys", "fewer routers than experts"],
)
def test_each_command_names_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, flags: tuple[object, ...], remedy: str
) -> None:
    warning = "experts are tied in layers 0, 1, 2 (layer 0: 0 and 1, "
    assert convert(folder, *flags) == 0
    assert warning in (said := capsys.readouterr().err) and remedy in said
    for command in (["verify", folder / "dense", folder / "moe"], ["inspect", folder / "moe"]):
        assert cli.main(list(map(str, command))) == 0
        assert warning in (said := capsys.readouterr().out) and remedy in said
    run = Run(Namespace(rank=0), RouterConfig(), str(folder / "moe"))
    monkeypatch.setattr(pretrain.launch, "prepare", lambda argv: run)
    monkeypatch.setattr(pretrain, "train", lambda run: None)
    pretrain.pretrain([])
    assert warning in capsys.readouterr().out


def test_nothing_is_said_where_gates_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(folder) == 0 and capsys.readouterr().err == ""
    assert routing_start.warn_of_ties(folder / "moe") is None


def test_random_keys_part_heads_whose_own_keys_are_equal(folder: Path) -> None:
    stats = make_stats(folder / "ks")
    assert stats.attended is not None
    stats.attended[:, 1] = stats.attended[:, 0]
    key_stats_file.save(folder / "ks", stats, overwrite=True)
    file = "configs/ablations/random_keys.yaml"
    assert convert(folder) == 0
    warning = routing_start.warn_of_ties(folder / "moe")
    assert warning is not None and f"convert again with --config {file}" in warning
    assert convert(folder, "--config", file) == 0 and routing_start.warn_of_ties(folder / "moe") is None


def test_a_checkpoint_that_convert_did_not_make_is_not_opened(tmp_path: Path) -> None:
    """Such as a Mixture-of-Experts in Megatron's older format, which a run resumes."""
    (tmp_path / "iter_0000002/mp_rank_00_000").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    assert routing_start.warn_of_ties(tmp_path) is None


def test_shards_of_one_copy_are_not_ties() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(5)).repeat_interleave(2, dim=1)
    assert tied_experts(logits, granularity=2) == ()
    assert tied_experts(logits) == ((0, 1), (2, 3), (4, 5), (6, 7))
