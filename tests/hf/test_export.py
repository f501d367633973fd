"""``router-upcycle export-hf``: what checkpoints and Mixtures-of-Experts become."""

import json
from pathlib import Path

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from tests import dense_checkpoint, hf_models, legacy_checkpoint
from tests.dense_checkpoint import assert_same
from tests.hf.folders import TOKENS, Capsys, make_moe, run


def test_a_checkpoint_saved_at_tensor_parallel_2_by_transformer_engine_or_in_legacy_format(
    tmp_path: Path,
) -> None:
    """Chunks of rows and of columns, gate and up apart; the norm under its other name."""
    tensors = dense_checkpoint.tensors()
    args = dense_checkpoint.arguments(max_position_embeddings=16, vocab_size=37)
    dense_checkpoint.write(tmp_path / "one", tensors, args=args)
    assert run("export-hf", tmp_path / "one", tmp_path / "hf one") == 0
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    renamed = tensors | {"decoder.layers.pre_mlp_layernorm.weight": tensors[norm]}
    del renamed[norm]
    dense_checkpoint.write(tmp_path / "two", renamed, tensor_parallel=2, optimizer=True, args=args)
    assert run("export-hf", tmp_path / "two", tmp_path / "hf two") == 0
    found = hf_models.tensors(tmp_path / "hf two")
    assert_same(found, hf_models.tensors(tmp_path / "hf one"))

    legacy_checkpoint.write(tmp_path / "legacy", tensors, tensor_parallel=2, stages=((0,), (1, 2)), args=args)
    assert run("export-hf", tmp_path / "legacy", tmp_path / "hf legacy") == 0
    assert_same(hf_models.tensors(tmp_path / "hf legacy"), found)

    assert found["lm_head.weight"].shape == (37, dense_checkpoint.HIDDEN)


def test_equal_experts_are_the_dense_model(models: Path, tmp_path: Path) -> None:
    """A converted Mixture-of-Experts, top-k before softmax, whose experts share their bytes."""
    assert run("import-hf", models / "qwen3", tmp_path / "dense") == 0
    options = ("--router", "linear", "--num-experts", 4, "--no-moe-router-pre-softmax")
    assert run("convert", tmp_path / "dense", tmp_path / "moe", *options) == 0
    assert run("export-hf", tmp_path / "moe", tmp_path / "hf", "--max-shard-size", "100KB") == 0
    found, expected = (hf_models.logits(folder, TOKENS) for folder in (tmp_path / "hf", models / "qwen3"))
    assert (found - expected).abs().max() < 1e-5
    # Whoever trains it first balances its experts: the paper's 0.02 for 2 layers and 2 experts a token.
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert settings["router_aux_loss_coef"] == pytest.approx(0.02 * 2 / 2)
    assert (settings["num_experts"], settings["num_local_experts"]) == (4, 4)
    assert settings["norm_topk_prob"] is True
    card = (tmp_path / "hf/README.md").read_text()
    assert "top-k, then softmax" in card
    assert "the experts have not been trained yet; for their training the paper's `aux_loss` 0.02" in card


@pytest.mark.parametrize("width", [0, 16])
def test_width_of_the_shared_expert(tmp_path: Path, width: int) -> None:
    moe = make_moe(tmp_path, 3, "--num-experts", 4)
    assert run("export-hf", moe, tmp_path / "hf", "--shared-expert-width", width) == 0
    found = hf_models.tensors(tmp_path / "hf")
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert (name in found) == bool(width) and (not width or found[name].shape == (32, width))
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_the_card_and_the_record_tell_of_rounding(tmp_path: Path, capsys: Capsys) -> None:
    moe = make_moe(tmp_path, 5, "--num-experts", 4)
    assert cli.main(["export-hf", str(moe), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    record = json.loads((tmp_path / "hf/export_hf.json").read_text())
    rounding = record["rounding"]
    assert rounding["choices"] == 3 * 1024 * 2 and 0 < rounding["by_rounding"] < 200
    said = f"of {rounding['choices']} choices of an expert for random tokens {rounding['by_rounding']} are"
    assert said in capsys.readouterr().out and said in (tmp_path / "hf/README.md").read_text()
    assert record["source"]["digest"] == open_checkpoint(moe).digest()
    assert str(tmp_path) not in (tmp_path / "hf/README.md").read_text()
