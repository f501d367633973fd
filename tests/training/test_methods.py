"""Every method trains at EP 2, saves, resumes, verifies and exports; Switch drops, LocMoE's loss works."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from tests import launch
from tests.conversion.test_methods import CONFIGS, METHODS, ROUTER, kind_of
from tests.router_kinds import KINDS

EP2 = ("--expert-model-parallel-size", 2, "--use-distributed-optimizer")


def over_the_tests_model(folder: Path, method: str, moe_config: Path, **changes: object) -> Path:
    """The method's file over the test's model in place of the demonstration's."""
    files = (CONFIGS / f"methods/{name}.yaml" for name in ("base", method))
    common, own = (yaml.safe_load(file.read_text()) for file in files)
    entries = common | own | {"base": str(moe_config)} | changes
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def numbers(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\| {name}: (\S+) \|", text)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_resumes_and_leaves(
    tmp_path: Path, dense: Path, key_stats_file: Path, moe_config: Path, method: str
) -> None:
    file = over_the_tests_model(tmp_path, method, moe_config, train_iters=6)
    moe, run = tmp_path / "moe", tmp_path / "run"
    launch.cli("convert", dense, moe, "--config", file, "--key-stats", key_stats_file).ok()
    whole = launch.ranks(2, "pretrain", "--config", file, "--load", moe, "--save", run, *EP2).ok()
    assert list(whole.losses) == [1, 2, 3, 4, 5, 6] and whole.losses[6] < whole.losses[1]
    if method == "switch":
        assert 0 < max(numbers(whole.text, "dropped token share")) < 1

    stored = open_checkpoint(run).tensors
    router = {key for key in stored if key.startswith(f"{ROUTER}.")}
    assert router == {key for key in open_checkpoint(moe).tensors if key.startswith(f"{ROUTER}.")}
    assert router == {f"{ROUTER}.{name}" for name in KINDS[kind_of(method)].shapes}

    again = launch.ranks(2, "pretrain", "--config", file, "--load", run, "--ckpt-step", 4, *EP2).ok()
    # On the CPU, jitter and the data loaders draw from one generator, and a resumed run makes loaders anew.
    exactly = 1e-3 if method == "switch" else 0.0
    assert list(again.losses) == [5, 6]
    for iteration, loss in again.losses.items():
        assert loss == pytest.approx(whole.losses[iteration], rel=exactly, abs=0)

    assert "values not compared" in launch.cli("verify", dense, run).ok().text
    exported = launch.cli("export-hf", run, tmp_path / "hf")
    if KINDS[kind_of(method)].stock:
        exported.ok()
    else:
        assert exported.returncode == 2 and "no stock class computes" in exported.errors[0]


def train_with_text_of_its_own_on_each_rank() -> None:
    """``pretrain``, but that rank r of R sees only tokens that are r modulo R."""
    from megatron_router_upcycling.training import language_model, launch, train

    run = launch.prepare(sys.argv[1:])
    get_batch = language_model.get_batch

    def get_own_batch(*args: Any) -> dict[str, Any]:
        batch, ranks = get_batch(*args), run.args.world_size
        own = {name: batch[name] // ranks * ranks + run.args.rank for name in ("tokens", "labels")}
        return batch | own

    language_model.get_batch = get_own_batch
    train.train(run)


@pytest.mark.slow
def test_locality_loss_moves_tokens_to_local_experts(tmp_path: Path, dense: Path, moe_config: Path) -> None:
    """Where ranks see different text. Of the same text on all ranks their gradients cancel on average."""
    shares = {}
    for coefficient in (1e-6, 1.0):
        file = over_the_tests_model(
            tmp_path, "locmoe", moe_config, train_iters=20, lr=0.005,
            upcycling={"router": "locmoe", "locality_loss_coeff": coefficient},
        )  # fmt: skip
        moe = tmp_path / f"moe {coefficient}"
        launch.cli("convert", dense, moe, "--config", file).ok()
        text = launch.ranks(2, __file__, "--config", file, "--load", moe, *EP2).ok().text
        losses, shares[coefficient] = numbers(text, "locality_loss"), numbers(text, "local token share")
        assert losses[0] == pytest.approx(0.69, abs=0.1)  # of two ranks' experts, half the mass is local
    assert abs(shares[1e-6][-1] - 0.5) < 0.15
    assert losses[-1] < 0.3 and shares[1.0][-1] > 0.8


if __name__ == "__main__":
    train_with_text_of_its_own_on_each_rank()
