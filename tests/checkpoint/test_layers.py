"""Experts in some layers only: the keys that Megatron gives to unlike layers; dense layers untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import parse_layers
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint, launch, legacy_checkpoint
from tests.checkpoint.test_dense_inputs import convert, write_per_layer
from tests.conftest import EVALUATE
from tests.dense_checkpoint import LAYERS

PREFIX = "decoder.layers."


def apart(values: dict[str, torch.Tensor], layers: range | tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{layer}.{key.removeprefix(PREFIX)}": value[layer]
        for key, value in values.items()
        if key.startswith(PREFIX)
        for layer in layers
    }


WRITERS = {
    "torch_dist": lambda root, values: dense_checkpoint.write(root, values, 2, optimizer=True),
    "per layer": lambda root, values: write_per_layer(root, values, tensor_parallel=2),
    "legacy": lambda root, values: legacy_checkpoint.write(root, values, 2, ((0, 1), (2,))),
}


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("options", [{}, {"granularity": 2, "shared_expert": True}], ids=["whole", "cut"])
def test_chosen_layers_get_what_they_would_get_among_all(
    tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    values = dense_checkpoint.tensors(torch.bfloat16)
    WRITERS[source](tmp_path / "dense", values)
    everywhere = convert(tmp_path / "dense", tmp_path / "everywhere", **options)
    found = convert(tmp_path / "dense", tmp_path / "moe", "0,2", **options)
    chosen, dense = (0, 2), (1,)
    expected = {key: value for key, value in values.items() if not key.startswith(PREFIX)}
    expected |= apart(values, dense) | apart(everywhere, chosen)
    dense_checkpoint.assert_same(found, expected)
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe"))


def test_extra_states_arguments_and_manifest(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", "1", num_experts=2)
    moe = open_checkpoint(tmp_path / "moe")
    states = {key for key in moe.objects if "_extra_state" in key}
    expected = {"decoder.final_layernorm._extra_state/shard_0_1"}
    for layer in range(LAYERS):
        for module in ("linear_qkv", "linear_proj", "core_attention"):
            expected.add(f"{PREFIX}{layer}.self_attention.{module}._extra_state/shard_0_1")
        expected.add(f"{PREFIX}{layer}.pre_mlp_layernorm._extra_state/shard_0_1")
        for linear in ("linear_fc1", "linear_fc2"):
            experts = f"{PREFIX}1.mlp.experts.experts.{linear}._extra_state/shard_"
            dense = f"{PREFIX}{layer}.mlp.{linear}._extra_state/shard_0_1"
            expected |= {f"{experts}{expert}_2" for expert in range(2)} if layer == 1 else {dense}
    assert states == expected
    assert moe.args.moe_layer_freq == [0, 1, 0]
    record = manifest.read(tmp_path / "moe")
    assert record is not None and record["model"]["moe_layer_freq"] == "[0,1,0]"


def test_list_of_layers() -> None:
    assert parse_layers("1,3,5-7", 8) == (1, 3, 5, 6, 7) and parse_layers("1-7:2", 8) == (1, 3, 5, 7)
    assert parse_layers("0", 8) == (0,) and parse_layers(" 2 , 2-2 ", 8) == (2,)
    assert parse_layers("0-7", 8) is None and parse_layers("0-6:2,1-7:2", 8) is None
    for text in ("", "a", "1,", "-1", "8", "3-2", "1-9", "1-3:0:1", "1.5"):
        with pytest.raises(UserError, match="--layers"):
            parse_layers(text, 8)


@pytest.mark.slow
def test_step_0_is_the_dense_model(
    tmp_path: Path, dense: Path, dense_validation: float, moe_config: Path, key_stats_file: Path
) -> None:
    """Megatron builds the unlike layers, loads them, and computes the dense model's loss: cut, with a shared
    expert, in every other layer, two ranks of expert parallelism. Then it trains on."""
    moe = tmp_path / "moe"
    options = ("--num-experts", 4, "--granularity", 2, "--shared-expert", "--layers", "1-3:2")
    stats = ("--key-stats", key_stats_file, "--no-moe-router-pre-softmax")
    launch.cli("convert", dense, moe, *stats, *options).ok()
    command = ("--config", moe_config, "--load", moe, "--expert-model-parallel-size", 2, "--train-iters", 1)
    output = launch.ranks(2, "pretrain", *command, *EVALUATE).ok()
    assert output.validation == pytest.approx(dense_validation, rel=1e-5)
    assert launch.ranks(2, "pretrain", *command, "--save", tmp_path / "run").ok().losses.keys() == {1}
