"""Megatron loads converted checkpoints in every layout, and they are the dense model.

Top-k before softmax in float32 without dropout: n equal experts whose weights sum to 1 give exactly the dense
FFN, so that the losses agree to rounding.
"""

from pathlib import Path

import pytest

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from tests import launch
from tests.conftest import EVALUATE

TOLERANCE = 1e-5  # relative, of the LM loss
LAYOUTS = [
    pytest.param(1, (), id="EP 1"),
    pytest.param(2, ("--expert-model-parallel-size", 2), id="EP 2"),
    pytest.param(4, ("--expert-model-parallel-size", 4, "--micro-batch-size", 2), id="EP 4"),
    pytest.param(2, ("--pipeline-model-parallel-size", 2), id="PP 2"),
    pytest.param(2, ("--tensor-model-parallel-size", 2, "--sequence-parallel"), id="TP 2"),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_loss_is_the_dense_models(
    moe: Path, moe_config: Path, dense_validation: float, ranks: int, layout: tuple[object, ...]
) -> None:
    output = launch.ranks(ranks, "pretrain", "--config", moe_config, "--load", moe, *EVALUATE, *layout).ok()
    assert output.validation == pytest.approx(dense_validation, rel=TOLERANCE)
    assert "validation loss at iteration 0" in output.text


@pytest.mark.slow
def test_dense_model_of_another_layout_and_shape(
    tmp_path: Path, dense_config: Path, moe_config: Path
) -> None:
    """Trained at TP 2 with the distributed optimizer; query and key norms, tied embeddings, no QKV bias."""
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        f"base: {dense_config}\nadd_qkv_bias: false\nqk_layernorm: true\n"
        "untie_embeddings_and_output_weights: false\ntrain_iters: 4\n"
    )
    dense, stats, moe = tmp_path / "dense", tmp_path / "key_stats", tmp_path / "moe"
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer")
    launch.ranks(2, "pretrain", "--config", changed, "--save", dense, *layout).ok()
    loss = launch.ranks(1, "pretrain", "--config", changed, "--load", dense, *EVALUATE).ok().validation
    command = ("--config", changed, "--load", dense, "--output", stats, "--collect-iters", 1)
    launch.ranks(1, "collect_keys", *command).ok()
    convert = ("convert", dense, moe, "--key-stats", stats, "--num-experts", 4, "--no-moe-router-pre-softmax")
    launch.cli(*convert).ok()
    assert len(open_checkpoint(dense).tensors["decoder.layers.mlp.linear_fc2.weight"].chunks) == 8

    continued = tmp_path / "moe.yaml"
    continued.write_text(f"base: {changed}\nmoe_router_dtype: fp32\n")
    command = ("--config", continued, "--load", moe, "--expert-model-parallel-size", 2)
    output = launch.ranks(2, "pretrain", *command, *EVALUATE).ok()
    assert output.validation == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.slow
def test_dense_model_with_biases(tmp_path: Path, dense_config: Path) -> None:
    """GPT-2's kind: LayerNorm, GELU, biases everywhere, learned positions; the linear router."""
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        f"base: {dense_config}\ndisable_bias_linear: false\nnormalization: LayerNorm\nswiglu: false\n"
        "position_embedding_type: learned_absolute\ntrain_iters: 2\n"
    )
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    trained = launch.ranks(1, "pretrain", "--config", changed, "--save", dense).ok()
    launch.cli("convert", dense, moe, "--router", "linear", "--no-moe-router-pre-softmax").ok()
    output = launch.ranks(1, "pretrain", "--config", changed, "--load", moe, *EVALUATE).ok()
    assert output.validation == pytest.approx(trained.validation, rel=TOLERANCE)


def test_softmax_before_top_k_raises_the_loss(
    tmp_path: Path, dense: Path, moe_config: Path, key_stats_file: Path, dense_validation: float
) -> None:
    """What ``convert`` says of the paper's order: the FFN's output shrinks, so the model is another one."""
    moe = tmp_path / "moe"
    launch.cli("convert", dense, moe, "--key-stats", key_stats_file, "--num-experts", 8, "--top-k", 1).ok()
    output = launch.ranks(1, "pretrain", "--config", moe_config, "--load", moe, *EVALUATE).ok()
    assert output.validation > dense_validation * (1 + TOLERANCE)
