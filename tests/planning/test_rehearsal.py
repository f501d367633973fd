"""Rehearsals: one real rank of many, alone, beside what plan says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_router_upcycling.planning import figures, reading
from tests import launch
from tests.conftest import MODEL, TRAINING

MOE = yaml.safe_load("""
{num_experts: 8, moe_router_topk: 2, moe_router_pre_softmax: true, moe_token_dispatcher_type: alltoall,
 moe_router_dtype: fp32, moe_router_load_balancing_type: aux_loss, moe_aux_loss_coeff: 0.02,
 use_distributed_optimizer: true, bf16: true, global_batch_size: 256, upcycling: {router: mixture}}
""")
WORLD, DOOR = 64, "megatron_router_upcycling.pretrain"


@pytest.fixture(scope="session")
def config(folder: Path) -> Path:
    """A Mixture-of-Experts from scratch, its data and tokenizer not there."""
    path = folder / "rehearsed.yaml"
    absent = {"data_path": ["/not/there/data"], "num_layers": 8, "ffn_hidden_size": 128}
    path.write_text(yaml.safe_dump(MODEL | TRAINING | MOE | absent))
    return path


def rehearse(config: Path, output: Path, *flags: object) -> Any:
    done = launch.python("-m", DOOR, "--config", config, "--rehearse", WORLD, "--output", output, *flags)
    assert done.ok().text.count("rehearsal of rank") == 1
    return json.loads(output.read_text())


LAYOUTS = {
    "EP 8": (11, "--expert-model-parallel-size 8 --normalization LayerNorm"),
    "TP 2 x PP 4, uneven, some dense": (
        40,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4"
        " --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1"
        " --moe-layer-freq [0,1,1,0,1,1,1,1] --qk-layernorm",
    ),
    "ETP 1, shared expert, last stage": (
        63,
        "--tensor-model-parallel-size 4 --sequence-parallel --expert-tensor-parallel-size 1"
        " --expert-model-parallel-size 4 --pipeline-model-parallel-size 2 --num-routers 4"
        " --moe-shared-expert-intermediate-size 64 --moe-ffn-hidden-size 32",
    ),
    "virtual stages, linear router": (
        63,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --router linear",
    ),
}


@pytest.mark.parametrize(
    "name", ["EP 8", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:])]
)
def test_plan_is_exact_of_the_real_rank(config: Path, tmp_path: Path, name: str) -> None:
    rank, words = LAYOUTS[name]
    found = rehearse(config, tmp_path / "found.json", *words.split(), "--rehearse-rank", rank)
    counts = found["parameters"]
    assert counts["measured"] == counts["plan"] and sum(counts["plan"].values()) > 0
    assert found["weights"]["measured"] == found["weights"]["plan"]
    # Buffers and shards are padded: by under 2 percent at these sizes.
    for part in ("gradients", "optimizer"):
        assert found[part]["measured"] == pytest.approx(found[part]["plan"], rel=0.02)
    # What autograd keeps, against the estimate for separate operators: index tensors weigh more at this size,
    # and of a few dozen tokens as many come to this rank's experts as the lot sends.
    assert 0.8 < found["activations"]["measured"] / found["activations"]["plan"] < 1.3
    if name == "EP 8":
        sent, tokens, D, layers = found["sent_in_the_step"], 4 * 32, 64, 8
        experts = counts["plan"]["experts"]
        others = sum(counts["plan"].values()) - experts
        # Gradients in float32 once, weights in bfloat16 twice, for two optimizers gather them.
        expected = 8 * (others * 63 / 64 + experts * 7 / 8)
        assert sent["data_parallel"] == pytest.approx(expected, rel=0.01)
        # Tokens there and back, forward and backward, and the router's weights of them.
        assert sent["expert_parallel"] == pytest.approx(4 * 2 * tokens * D * 2 * 7 / 8 * layers, rel=0.1)
        assert found["tokens_of_the_step"] == tokens
    # The plan is of the configured step. At this size what tensor parallelism sends for the embedding and for
    # gradients of norms and routers, which a plan leaves out, is a third of the rest.
    plan = reading.read(config, None, words.split(), WORLD)
    step = found["tokens_of_the_step"] / (plan.seq_length * plan.micro_batch_size * plan.num_microbatches)
    for kind, size in figures.communication(plan, found["pipeline_rank"]).items():
        sent = found["sent_in_the_step"].get(kind, 0)
        if kind == "tensor_parallel":
            assert 1 <= sent / (size * step) < 1.4 if size else sent == 0
        else:
            assert sent == pytest.approx(size * (1 if kind == "data_parallel" else step), rel=0.1)


def test_a_shard_is_loaded_as_megatron_places_it(moe: Path, moe_config: Path, tmp_path: Path) -> None:
    """Rank 13 of 16 at TP 2, PP 2, EP 2, held against the checkpoint's tensors."""
    code = "from tests.planning import test_rehearsal as t; import sys; t.check_shard(sys.argv[1:])"
    layout = (
        "--rehearse 16 --rehearse-rank 13 --tensor-model-parallel-size 2 --sequence-parallel"
        " --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 64"
    )
    launch.python("-c", code, "--config", moe_config, "--load", moe, *layout.split()).ok()


def check_shard(argv: list[str]) -> None:
    import torch

    from megatron_router_upcycling.checkpoint.open import open_checkpoint
    from megatron_router_upcycling.planning.rehearsal import run as rehearsal
    from megatron_router_upcycling.training import launch, train

    prepared, _ = rehearsal.prepare(launch.parse(argv))
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    model, _, _ = train.build(prepared.args, train.model_config(prepared))
    (chunk,) = unwrap_model(model)
    parameters = dict(chunk.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(torch.nan)
    rehearsal.load_shard(model, prepared.load)
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    checkpoint = open_checkpoint(prepared.load)
    tp, ep = mpu.get_tensor_model_parallel_rank(), mpu.get_expert_model_parallel_rank()
    pp = mpu.get_pipeline_model_parallel_rank()

    def whole(key: str, layer: int) -> torch.Tensor:
        return checkpoint.read_layer(key, layer, bytearray())

    layer = 2 * pp  # of two stages of two layers
    gate, up = whole("decoder.layers.mlp.experts.experts.linear_fc1.weight", layer)[4 * ep + 1].chunk(2)
    projection = whole("decoder.layers.self_attention.linear_proj.weight", layer)
    for name, expected in {
        "mlp.router.query_weight": whole("decoder.layers.mlp.router.query_weight", layer),
        "self_attention.linear_proj.weight": projection.chunk(2, dim=1)[tp],
        # Experts 4 * ep and on; gate and up projections are cut apart.
        "mlp.experts.local_experts.1.linear_fc1.weight": torch.cat([gate.chunk(2)[tp], up.chunk(2)[tp]]),
    }.items():
        assert torch.equal(parameters[f"decoder.layers.0.{name}"], expected), name


def test_a_wrong_layout_is_one_line(config: Path) -> None:
    flags = ("--rehearse", WORLD, "--tensor-model-parallel-size", 3)
    done = launch.python("-m", DOOR, "--config", config, *flags)
    assert done.returncode == 2 and "Traceback" not in done.text
    assert done.errors == ["error: --gpus 64: is not divisible by TP x PP x CP = 3; 63 or 66 would be"]
