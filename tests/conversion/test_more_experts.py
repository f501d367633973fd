"""More experts of a trained Mixture-of-Experts, in Megatron's own loop and in transformers."""

from pathlib import Path

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.verify import proof
from tests import launch
from tests.conftest import EVALUATE, LAYERS

type Trained = tuple[Path, dict[int, float]]

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
ROUTER = "decoder.layers.mlp.router.expert_key"


def grow(moe: Path, out: Path, *options: object) -> launch.Output:
    return launch.cli("convert", moe, out, "--num-experts", 16, *options)


def validation(config: Path, moe: Path, ranks: int = 1) -> float:
    layout = ("--expert-model-parallel-size", ranks)
    return launch.ranks(ranks, "pretrain", "--config", config, "--load", moe, *EVALUATE, *layout).validation


@pytest.fixture(scope="module")
def loss(unbroken: Trained, moe_config: Path) -> float:
    return validation(moe_config, unbroken[0])


@pytest.mark.parametrize(
    "options",
    [("--top-k", 4, "--router-noise", 0), ("--keep-function", "--allow-no-export")],
    ids=["twice the choices", "a group a copy"],
)
def test_the_function_is_kept(
    tmp_path: Path, unbroken: Trained, moe_config: Path, loss: float, options: tuple[object, ...]
) -> None:
    moe, grown = unbroken[0], tmp_path / "grown"
    said = grow(moe, grown, *options).ok().text
    assert "the optimizer starts afresh" in said
    assert validation(moe_config, grown, ranks=2) == pytest.approx(loss, rel=1e-5)
    assert not proof.run(proof.prepare(moe, grown))


def test_copies_of_one_expert_chosen_together_change_it(
    tmp_path: Path, unbroken: Trained, moe_config: Path, loss: float
) -> None:
    grown = tmp_path / "grown"
    said = grow(unbroken[0], grown).ok().text
    assert "the loss is above that of the model it was made of" in said
    assert validation(moe_config, grown) > loss * (1 + 1e-4)


def test_only_routers_are_written(tmp_path: Path, unbroken: Trained) -> None:
    grown = tmp_path / "grown"
    grow(unbroken[0], grown).ok()
    old, new = open_checkpoint(unbroken[0]), open_checkpoint(grown)
    record = manifest.read(grown)
    assert record is not None and new.args.num_experts == record["router"]["num_experts"] == 16
    written = sum(file["bytes"] for name, file in record["files"].items() if name.endswith(".distcp"))
    routers = new.tensors[ROUTER].nbytes
    states = new.objects["common_state/shard_0_1"].length
    assert routers < written < routers + states + LAYERS * 2000
    places = [
        {(root.iteration_dir / blob.file).stat().st_ino: blob.offset for blob in root.blobs(EXPERTS)}
        for root in (old, new)
    ]
    assert places[0] == places[1]
    assert new.tensors[EXPERTS].shape[1] == 16
    assert torch.equal(new.read_box(EXPERTS), old.read_box(EXPERTS).repeat(1, 2, 1, 1))
