"""``router-upcycle export-hf``: what checkpoints and Mixtures-of-Experts become."""

import json
from pathlib import Path

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from tests import dense_checkpoint, hf_models, legacy_checkpoint
from tests.hf.folders import TOKENS, assert_equal, make_moe, run


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
    assert_equal(found, hf_models.tensors(tmp_path / "hf one"))

    legacy_checkpoint.write(tmp_path / "legacy", tensors, tensor_parallel=2, stages=((0,), (1, 2)), args=args)
    assert run("export-hf", tmp_path / "legacy", tmp_path / "hf legacy") == 0
    assert_equal(hf_models.tensors(tmp_path / "hf legacy"), found)

    H, G, d = dense_checkpoint.HEADS, dense_checkpoint.GROUPS, dense_checkpoint.HEAD_DIM
    fused = tensors["decoder.layers.self_attention.linear_qkv.weight"]
    for layer in range(dense_checkpoint.LAYERS):
        for group in range(G):
            block = fused[layer, group * (H // G + 2) * d :][: (H // G + 2) * d]
            prefix = f"model.layers.{layer}.self_attn"
            queries = found[f"{prefix}.q_proj.weight"][group * (H // G) * d :][: (H // G) * d]
            assert torch.equal(queries, block[: -2 * d])
            assert torch.equal(found[f"{prefix}.k_proj.weight"][group * d :][:d], block[-2 * d : -d])
            assert torch.equal(found[f"{prefix}.v_proj.weight"][group * d :][:d], block[-d:])
    assert found["lm_head.weight"].shape == (37, dense_checkpoint.HIDDEN)


def test_layers_under_keys_of_their_own(tmp_path: Path) -> None:
    """As Megatron stores them where they may be unlike, here alike all the same."""
    args = dense_checkpoint.arguments(max_position_embeddings=16)
    tensors = dense_checkpoint.write(tmp_path / "stacked", args=args)
    apart = dense_checkpoint.Folder(tmp_path / "apart/iter_0000008")
    for key, value in tensors.items():
        if key.startswith("decoder.layers."):
            for layer in range(dense_checkpoint.LAYERS):
                own = key.replace("layers.", f"layers.{layer}.", 1)
                apart.add(own, value[layer], (1,) * (value.dim() - 1))
        else:
            apart.add(key, value, (1,) * value.dim())
    apart.add_object("common_state/shard_0_1", {"args": args})
    apart.finish()
    (tmp_path / "apart/latest_checkpointed_iteration.txt").write_text("8")
    for name in ("stacked", "apart"):
        assert run("export-hf", tmp_path / name, tmp_path / f"hf {name}") == 0
    assert_equal(hf_models.tensors(tmp_path / "hf apart"), hf_models.tensors(tmp_path / "hf stacked"))


def scores_by_loops(tensors: dict[str, torch.Tensor], layer: int, pooling: str) -> torch.Tensor:
    """A matrix for each router and expert key, [m, n*c, D], folded by loops in float64."""
    query = tensors["decoder.layers.mlp.router.query_weight"][layer].double()
    key = tensors["decoder.layers.mlp.router.expert_key"][layer].double()
    folded = torch.zeros(query.shape[0], key.shape[0], query.shape[2], dtype=torch.float64)
    for j in range(query.shape[0]):
        for i in range(key.shape[0]):
            for r in range(query.shape[1]):
                folded[j, i] += key[i, r] * query[j, r] / query.shape[1] ** 0.5
    return folded.sum(0, keepdim=True) if pooling == "sum" else folded


@pytest.mark.parametrize(
    ("options", "pooling", "code"),
    [
        (("--num-experts", 4), "sum", ()),
        (("--num-experts", 4, "--pooling", "max"), "max", ("--modelling-code",)),
        (("--num-experts", 2, "--num-routers", 4), "sum", ("--modelling-code",)),
    ],
    ids=["sum", "max", "two keys"],
)
def test_gates_and_experts_of_an_export(
    tmp_path: Path, options: tuple[object, ...], pooling: str, code: tuple[str, ...]
) -> None:
    moe = make_moe(tmp_path, 1, *options)
    assert run("export-hf", moe, tmp_path / "hf", *code) == 0
    source = dense_checkpoint.read_back(open_checkpoint(moe).iteration_dir)
    found = hf_models.tensors(tmp_path / "hf")
    F = dense_checkpoint.FFN
    for layer in range(dense_checkpoint.LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        gate = scores_by_loops(source, layer, pooling).flatten(0, 1)
        torch.testing.assert_close(found[f"{prefix}.gate.weight"].double(), gate, rtol=0, atol=2e-6)
        fc1, fc2 = (source[f"decoder.layers.mlp.experts.experts.linear_fc{i}.weight"][layer] for i in (1, 2))
        for expert in range(options[1]):
            name = f"{prefix}.experts.{expert}"
            assert torch.equal(found[f"{name}.gate_proj.weight"], fc1[expert, :F])
            assert torch.equal(found[f"{name}.up_proj.weight"], fc1[expert, F:])
            assert torch.equal(found[f"{name}.down_proj.weight"], fc2[expert])
        for name, tensor in found.items():
            if f"{prefix}.shared_expert." in name:
                assert not tensor.any()
    hf_models.load(tmp_path / "hf", trust_remote_code=bool(code))


@pytest.mark.parametrize("order", ["--moe-router-pre-softmax", "--no-moe-router-pre-softmax"])
def test_the_order_of_softmax_and_top_k(tmp_path: Path, order: str) -> None:
    moe = make_moe(tmp_path, 2, "--num-experts", 4, order)
    assert run("export-hf", moe, tmp_path / "hf") == 0
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert settings["norm_topk_prob"] == order.startswith("--no-")
    card = (tmp_path / "hf/README.md").read_text()
    assert ("top-k, then softmax" in card) == order.startswith("--no-")
    assert (settings["num_experts"], settings["num_experts_per_tok"]) == (4, 2)


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
    card = (tmp_path / "hf/README.md").read_text()
    assert "the experts have not been trained yet; for their training the paper's `aux_loss` 0.02" in card


@pytest.mark.parametrize("width", [0, 16])
def test_width_of_the_shared_expert(tmp_path: Path, width: int) -> None:
    moe = make_moe(tmp_path, 3, "--num-experts", 4)
    assert run("export-hf", moe, tmp_path / "hf", "--shared-expert-width", width) == 0
    found = hf_models.tensors(tmp_path / "hf")
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert (name in found) == bool(width) and (not width or found[name].shape == (32, width))
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_the_card_and_the_record_tell_of_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = make_moe(tmp_path, 5, "--num-experts", 4)
    assert cli.main(["export-hf", str(moe), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    record = json.loads((tmp_path / "hf/export_hf.json").read_text())
    rounding = record["rounding"]
    assert rounding["choices"] == 3 * 1024 * 2 and 0 < rounding["by_rounding"] < 200
    said = f"of {rounding['choices']} choices of an expert for random tokens {rounding['by_rounding']} are"
    assert said in capsys.readouterr().out and said in (tmp_path / "hf/README.md").read_text()
    assert record["source"]["digest"] == open_checkpoint(moe).digest()
    assert str(tmp_path) not in (tmp_path / "hf/README.md").read_text()
