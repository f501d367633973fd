"""Plans on paper: the paper's run, what is refused, what is warned of. Exactness is tested by rehearsal."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_router_upcycling.cli import main
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import figures, reading, report, setup
from megatron_router_upcycling.routers.config import RouterConfig
from tests import launch

MODEL = {
    "num_layers": 24,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 16,
    "kv_channels": 64,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_qkv_bias": True,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
RUN = {
    "vocab_size": 151936,
    "seq_length": 4096,
    "micro_batch_size": 4,
    "global_batch_size": 1024,
    "train_iters": 25000,
    "bf16": True,
    "use_distributed_optimizer": True,
    "lr": 5e-4,  # changes no size: not read
}
MOE = {"num_experts": 8, "moe_router_topk": 2, "upcycling": {"router": "mixture"}}


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """The paper's run (section 4.1) in one file."""
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(MODEL | RUN | MOE))
    return path


def plan(config: Path, *flags: object, gpus: int = 64, load: Path | None = None) -> dict:
    described = reading.read(config, load, [str(flag) for flag in flags], gpus)
    setup.check(described)
    made = figures.Plan(described)
    if problem := report.too_large(made, 80):
        raise UserError(problem)
    return json.loads(json.dumps(report.as_json(made, 80, 989.0)))


def test_the_papers_run(paper: Path) -> None:
    found = plan(paper)
    # Section 4.1 and the release: 2.1B parameters, 0.8B active, 100B tokens.
    assert round(found["parameters"]["total"] / 1e9, 1) == 2.1
    assert found["parameters"]["active"] == found["parameters"]["total"] - 24 * 6 * 3 * 1024 * 2816
    assert found["tokens"] == 25000 * 1024 * 4096
    assert found["setup"]["data_parallel_size"] == 64 and found["setup"]["num_microbatches"] == 4
    stage = found["stages"]["0"]
    assert stage["parameters"]["routers"] == 24 * 8 * (1024 + 1) * 128  # about 1M a layer (section 3.2)
    total = found["parameters"]["total"]
    assert stage["memory"]["weights"] == 2 * total and stage["memory"]["gradients"] == 4 * total
    assert stage["memory"]["optimizer"] == pytest.approx(12 * total / 64)
    sent = stage["communication"]
    assert sent["data_parallel"] == pytest.approx(6 * total * 63 / 64) and sent["expert_parallel"] == 0
    for name, share in found["utilisation"].items():
        rate = found["tokens"] * found["flops_per_token"] / found["seconds"][name]
        assert rate == pytest.approx(share * 64 * 989e12)
    assert not found["warnings"]


@pytest.mark.parametrize(
    ("micro_batch", "peak_gib", "seconds"),
    [(4, 38.6, {"host falls behind": 0.2194}), (8, 64.8, {"host keeps up": 0.3398})],
)
def test_what_was_measured(micro_batch: int, peak_gib: float, seconds: dict[str, float]) -> None:
    """On an H200, one rank of 64 in a step of one micro-batch (docs/performance.md)."""
    flags = (
        "--router",
        "mixture",
        "--micro-batch-size",
        micro_batch,
        "--global-batch-size",
        64 * micro_batch,
    )
    found = plan(launch.ROOT / "configs/qwen1.5-0.5b-8x/moe.yaml", *flags)
    assert found["stages"]["0"]["memory"]["total"] / 2**30 == pytest.approx(peak_gib, rel=0.03)
    for name, expected in seconds.items():
        assert found["seconds"][name] / 25_000 == pytest.approx(expected, rel=0.05)
    assert found["measured_on"] == "one rank of an H200"


def test_expert_parallel_moves_experts_and_optimizer_shards(paper: Path) -> None:
    one, eight = (plan(paper, "--expert-model-parallel-size", ep)["stages"]["0"] for ep in (1, 8))
    assert eight["parameters"] == one["parameters"] | {"experts": one["parameters"]["experts"] // 8}
    experts = one["parameters"]["experts"]
    others = sum(one["parameters"].values()) - experts
    assert eight["memory"]["optimizer"] == pytest.approx(12 * (others / 64 + experts / 8 / 8))
    tokens = 4 * 4 * 4096  # a step and GPU
    assert eight["communication"]["expert_parallel"] == 4 * 2 * tokens * 1024 * 2 * 7 / 8 * 24


def test_a_checkpoints_manifest_brings_model_and_router(tmp_path: Path, paper: Path) -> None:
    root, training = tmp_path / "moe", tmp_path / "training.yaml"
    root.mkdir()
    training.write_text(yaml.safe_dump(RUN))
    record = {"format": manifest.FORMAT, "router": RouterConfig(num_routers=8).to_dict(), "model": MODEL}
    manifest.write(root, record)
    assert plan(training, load=root)["stages"] == plan(paper)["stages"]
    four = plan(training, "--num-routers", 4, load=root)["stages"]["0"]["parameters"]["routers"]
    assert four == 24 * (4 * 1024 + 8) * 256
    with pytest.raises(UserError, match="--num-layers: is missing"):
        plan(training)


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        (64, ("--expert-model-parallel-size", 3), "--expert-model-parallel-size 3: .* 1, 2, 4, 8"),
        (63, ("--tensor-model-parallel-size", 2, "--sequence-parallel"), "--gpus 63: .* 62 or 64 would be"),
        (4, ("--expert-model-parallel-size", 8), "--expert-model-parallel-size 8: 4 GPUs are not divisible"),
        (
            70,
            ("--pipeline-model-parallel-size", 7, "--global-batch-size", 40),
            "--pipeline-model-parallel-size 7",
        ),
        (64, ("--tensor-model-parallel-size", 32), "--tensor-model-parallel-size 32: .* 16 attention heads"),
        (
            64,
            ("--num-query-groups", 2, "--group-query-attention", "--tensor-model-parallel-size", 4),
            "2 query gr",
        ),
        (64, ("--tensor-model-parallel-size", 2), "needs --sequence-parallel"),
        (64, ("--global-batch-size", 1000), "--global-batch-size 1000: .* 768 or 1024 would be"),
        (64, ("--num-routers", 3), "--num-routers 3: does not fit"),
        (64, ("--micro-batch-size", 16), "--gpu-memory-gib 80: .* --micro-batch-size 8"),
        (64, ("--seq-lenght", 8192), "did you mean 'seq_length'"),
        (64, ("--multi-latent-attention",), "--multi-latent-attention is not covered"),
        (64, ("--micro-batch-size", "four"), "--micro-batch-size four: must be a whole number"),
        (0, (), "--gpus 0: must be at least 1"),
        (64, ("--seq-length", 8192, "--max-position-embeddings", 4096), "--seq-length 8192: is more than"),
        (64, ("--moe-layer-freq", "[0]*24+[1"), "--moe-layer-freq .* must be a number, or a list"),
        (64, ("--moe-layer-freq", "[0]*10**12"), "--moe-layer-freq .* must be a number, or a list"),
        (64, ("--moe-layer-freq", "9**9**9"), "--moe-layer-freq .* must be a number, or a list"),
        (64, ("--moe-layer-freq", "[" * 100_000), "--moe-layer-freq .* must be a number, or a list"),
        (
            64,
            ("--pipeline-model-parallel-size", 4, "--num-layers-per-virtual-pipeline-stage", 4),
            "4: does not divide the 6 layers",
        ),
        (64, ("--use-precision-aware-optimizer",), "--use-precision-aware-optimizer is not covered"),
        (64, ("--optimizer", "sgd"), "--optimizer is not covered"),
    ],
)
def test_what_cannot_work_names_its_flag(
    paper: Path, gpus: int, flags: tuple[object, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(paper, *flags, gpus=gpus)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pipeline-model-parallel-size", 8, "--global-batch-size", 64), "micro-batches over 8 pipeline"),
        (("--expert-model-parallel-size", 8), "one expert a GPU"),
        (("--train-iters", 0), "--train-iters: is not given"),
    ],
)
def test_doubts_are_warnings(paper: Path, flags: tuple[object, ...], message: str) -> None:
    assert any(message in warning for warning in plan(paper, *flags)["warnings"])


def test_layers_with_experts_as_megatron_reads_them(paper: Path) -> None:
    for pattern, expected in (
        ("([0]+[1]*3)*6", [0, 1, 1, 1] * 6),
        ("[0]+[1]*23", [0, *[1] * 23]),
        ("3", [1, 0, 0] * 8),
    ):
        made = reading.read(paper, None, ["--moe-layer-freq", pattern], 64)
        assert made.has_experts() == expected


def test_pipeline_stages_hold_the_layers_once() -> None:
    for changes in (
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
        {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 2, "num_layers": 11},
    ):
        made = setup.Setup(**({"num_layers": 12, "num_attention_heads": 4} | changes))
        stages = [made.layers_of_stage(rank) for rank in range(made.pipeline_model_parallel_size)]
        assert sorted(sum(stages, [])) == list(range(made.num_layers))
    interleaved = setup.Setup(
        num_layers=8, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=4
    )
    assert interleaved.layers_of_stage(0) == [0, 2, 4, 6]  # as Megatron's own comment has it


def test_recomputation_takes_memory_off(paper: Path) -> None:
    def kept(*flags: object) -> float:
        return plan(paper, *flags)["stages"]["0"]["memory"]["activations"]

    full = kept(
        "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1
    )
    selective = kept("--recompute-granularity", "selective", "--recompute-modules", "moe_act", "layernorm")
    assert full < selective < kept()
    tokens, layer = 4 * 4096, kept() / 24
    assert full == pytest.approx(24 * tokens * 1024 * 2 + layer, rel=1e-2)


def test_the_command_needs_neither_torch_nor_megatron(paper: Path) -> None:
    """In a process where importing either fails."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = None\n"
        "from megatron_router_upcycling.cli import main\n"
        f"flags = ['plan', {str(paper)!r}, '--gpus', '64', '--expert-model-parallel-size', sys.argv[1]]\n"
        "sys.exit(main(flags))"
    )
    good, bad = (launch.run(sys.executable, "-c", code, ep) for ep in (8, 5))
    assert good.returncode == 0 and "2.10 B parameters (2098086912)" in good.text
    assert "warning: --expert-model-parallel-size 8: one expert a GPU" in good.text
    assert bad.returncode == 2 and bad.text.startswith("error: --expert-model-parallel-size 5:")
    assert len(bad.text.splitlines()) == 1


def test_no_argument_of_megatrons_is_taken_for_a_misspelt_one() -> None:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    options = add_megatron_arguments(ArgumentParser(allow_abbrev=False))._option_string_actions
    names = {option.lstrip("-").replace("-", "_") for option in options}
    read = {field.name for field in dataclasses.fields(setup.Setup)} | set(reading.NOT_COVERED)
    read |= set(reading.NEGATED)
    assert len(names) > 500
    reading.from_values(dict.fromkeys(names - read), {}, "Megatron")


def test_flops_are_megatrons(paper: Path) -> None:
    from argparse import Namespace

    from megatron.training.training import num_floating_point_operations

    made = reading.read(paper, None, ["--moe-layer-freq", "2"], 64)
    args = Namespace(
        **{
            name: getattr(made, name)
            for name in ("num_layers", "hidden_size", "num_attention_heads", "swiglu")
        },
        **{
            name: getattr(made, name)
            for name in ("num_experts", "moe_router_topk", "kv_channels", "seq_length")
        },
        group_query_attention=True,
        num_query_groups=made.groups,
        ffn_hidden_size=made.ffn,
        moe_ffn_hidden_size=made.expert_ffn,
        moe_layer_freq=made.moe_layer_freq,
        padded_vocab_size=made.vocabulary,
        moe_shared_expert_intermediate_size=None,
        moe_latent_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        experimental_attention_variant=None,
        attention_output_gate=False,
        hybrid_layer_pattern=None,
        hybrid_override_pattern=None,
        is_hybrid_model=False,
        linear_attention_freq=None,
    )
    expected = num_floating_point_operations(args, 1) / made.sequence
    assert figures.flops_per_token(made) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "24"], "--hidden-size: is missing"),  # 24 is no file
        (["CONFIG", "--peak-tflops", "0"], "argument --peak-tflops: 0 must be more than 0"),
        (["--config", "CONFIG", "--seq-length"], "--seq-length: needs a value"),
    ],
)
def test_the_commands_words(
    paper: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(paper) if word == "CONFIG" else word for word in words]
    assert main(["plan", "--gpus", "64", *words]) == 2
    assert message in capsys.readouterr().err
