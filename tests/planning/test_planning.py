"""Plans on paper: the paper's run, what is refused, what is warned of. Exactness is tested by rehearsal."""

import dataclasses
import json
import re
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

MODEL = yaml.safe_load("""
{num_layers: 24, hidden_size: 1024, ffn_hidden_size: 2816, num_attention_heads: 16, kv_channels: 64,
 normalization: RMSNorm, swiglu: true, add_qkv_bias: true, disable_bias_linear: true,
 position_embedding_type: rope, untie_embeddings_and_output_weights: true}
""")
RUN = yaml.safe_load("""
{vocab_size: 151936, seq_length: 4096, micro_batch_size: 4, global_batch_size: 1024, train_iters: 25000,
 bf16: true, use_distributed_optimizer: true, lr: 0.0005}
""")  # lr changes no size and is not read
MOE = {"num_experts": 8, "moe_router_topk": 2, "upcycling": {"router": "mixture"}}


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """The paper's run (section 4.1) in one file."""
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(MODEL | RUN | MOE))
    return path


def plan(config: Path, *flags: object, load: Path | None = None) -> dict:
    described = reading.read(config, load, [str(flag) for flag in flags], 64)
    assert report.too_large(described, 80) is None
    return json.loads(json.dumps(report.as_json(described, 80, 989.0)))


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
        faster = figures.step_seconds(reading.read(paper, None, [], 64), 2 * 989)[name]
        assert 2 * faster == pytest.approx(found["seconds"][name] / 25000)
    assert not found["warnings"]


@pytest.mark.parametrize(
    ("micro_batch", "impl", "peak_gib", "how", "seconds"),
    [
        (4, None, 38.4, "in CUDA graphs", 0.1772),
        (4, "none", 38.6, "host falls behind", 0.2194),
        (8, "none", 64.8, "host keeps up", 0.3398),
    ],
)
def test_what_was_measured(
    micro_batch: int, impl: str | None, peak_gib: float, how: str, seconds: float
) -> None:
    """On an H200, one rank of 64 in a step of one micro-batch (docs/performance.md)."""
    batch = ["--micro-batch-size", micro_batch, "--global-batch-size", 64 * micro_batch]
    batch += ["--cuda-graph-impl", impl] if impl else []
    found = plan(launch.ROOT / "configs/qwen1.5-0.5b-8x/moe.yaml", "--router", "mixture", *batch)
    assert found["parameters"]["total"] == 2_098_086_912
    assert found["stages"]["0"]["memory"]["total"] / 2**30 == pytest.approx(peak_gib, rel=0.03)
    assert found["seconds"][how] / 25_000 == pytest.approx(seconds, rel=0.05)
    assert (how in figures.IN_GRAPHS) == (len(found["seconds"]) == 1)


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
    half = plan(training, "--num-routers", 4, "--num-layers", 12, load=root)["stages"]["0"]["parameters"]
    assert half["routers"] == 12 * (4 * 1024 + 8) * 256
    with pytest.raises(UserError, match="--num-layers 0: must be at least 1; give it"):
        plan(training)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--expert-model-parallel-size 3", "3: .* the 8 experts; use one of 1, 2, 4, 8"),
        ("--expert-model-parallel-size 8 --gpus 4", "--gpus 4: .* x EP x PP = 8; 8 would be"),
        ("--tensor-model-parallel-size 2 --sequence-parallel --gpus 63", "--gpus 63: .* 62 or 64 would be"),
        ("--pipeline-model-parallel-size 7 --global-batch-size 40 --gpus 70", "size 7: .* the 24 layers"),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4", "4: .* 6 layers of a"),
        ("--tensor-model-parallel-size 32", "--tensor-model-parallel-size 32: .* the 16 query groups"),
        ("--num-query-groups 2 --group-query-attention --tensor-model-parallel-size 4", "the 2 query groups"),
        ("--num-query-groups 3 --group-query-attention", "--num-query-groups 3: .* the 16 attention heads"),
        ("--tensor-model-parallel-size 2", "needs --sequence-parallel"),
        ("--ffn-hidden-size 2817 --tensor-model-parallel-size 2", "the 2817 columns of the FFN"),
        ("--global-batch-size 1000", "--global-batch-size 1000: .* 768 or 1024 would be"),
        ("--seq-length 4098 --context-parallel-size 2", "--seq-length 4098: .* = 4; 4096 or 4100 would be"),
        ("--num-routers 3", "--num-routers 3: does not fit"),
        ("--seq-length 8192 --max-position-embeddings 4096", "--seq-length: is more than .* 4096"),
        ("--micro-batch-size 16", "--gpu-memory-gib 80: .* --micro-batch-size 8.* or --pipeline-model-"),
        ("--micro-batch-size four", "--micro-batch-size four: must be a whole number"),
        ("--num-query-groups 0 --group-query-attention", "--num-query-groups 0: must be at least 1"),
        ("--global-batch-size -4", "--global-batch-size -4: must be a whole number, not negative"),
        ("--seq-length", "--seq-length True: must be a whole number"),
        ("--num-layers=two-thirds", "--num-layers two-thirds: must be a whole number"),
        ("--seq-lenght 8192", "did you mean 'seq_length'"),
        ("--multi-latent-attention", "--multi-latent-attention is not covered"),
        ("--optimizer sgd", "--optimizer is not covered"),
        ("--gpus 0", "--gpus 0: must be at least 1"),
        ("--moe-router-topk 1 --moe-router-pre-softmax false", "--top-k 1 with --no-moe-router-pre-softmax"),
        ("--moe-layer-freq [0]*24+[1", "--moe-layer-freq .* must be a number, or a list"),
        ("--moe-layer-freq [0]*10**12", "--moe-layer-freq .* must be a number, or a list"),
        ("--moe-layer-freq [0]*7+[1]", "--moe-layer-freq: lists 8 layers; the model has 24"),
    ],
)
def test_what_cannot_work_names_its_flag(
    paper: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(["plan", str(paper), "--gpus", "64", *words.split()]) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: .*{message}", said) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 256"
         " --untie-embeddings-and-output-weights false", "parallel 1.25.*output l.*attention 3.8,.*idle 23%"),
        ("--expert-model-parallel-size 8 --ffn-hidden-size 0", "FFN 2688,.*--overlap-param-gather: is off"),
        ("--use-distributed-optimizer false --micro-batch-size 1",
         "~data parallel 15.39 GiB.*--use-distributed-optimizer: is off"),
        ("--bf16 false --grad-reduce-in-bf16 --micro-batch-size 2",
         "gradients 7.82 GiB, optimizer 0.24 GiB.*--bf16: is off"),
        ("--gpu-memory-gib 60 --train-samples 2048", " in 2 steps.*--gpu-memory-gib 60: .* leave little"),
        ("--tensor-model-parallel-size 16 --sequence-parallel --context-parallel-size 2"
         " --cross-entropy-loss-fusion",
         "vocabulary 153600,.*logits 0.75 GiB.*experts 2.1,.*--tensor-model-parallel-size: 16 GPUs"),
    ],
)  # fmt: skip
def test_sums_and_doubts(paper: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(["plan", str(paper), "--gpus", "64", *words.split()]) == 0
    assert re.search(message.replace("--", "\nwarning: --", 1), capsys.readouterr().out, re.DOTALL)


def test_pipeline_stages_hold_the_layers_once() -> None:
    for changes in (
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
        {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 2, "num_layers": 11},
    ):
        made = setup.Setup(**({"num_layers": 12, "num_attention_heads": 4} | changes))
        stages = [made.layers_of_stage(rank) for rank in range(made.pipeline_model_parallel_size)]
        assert sorted(sum(stages, [])) == list(range(made.num_layers))
    made = setup.Setup(4, pipeline_model_parallel_size=4, micro_batch_size=1, global_batch_size=9)
    assert [figures.in_flight(made, stage) for stage in range(4)] == [4, 3, 2, 1]
    chunks = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4}
    assert setup.Setup(num_layers=8, **chunks).layers_of_stage(0) == [0, 2, 4, 6]  # as Megatron comments


def test_recomputation_takes_memory_off(paper: Path) -> None:
    def kept(words: str = "") -> float:
        return plan(paper, *words.split())["stages"]["0"]["memory"]["activations"]

    full = kept("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    assert full < kept("--recompute-granularity selective --recompute-modules moe_act layernorm") < kept()
    tokens, layer = 4 * 4096, kept() / 24
    for method, inputs, whole in (("uniform", 4, 6), ("block", 6, 19)):
        found = kept(f"--recompute-granularity full --recompute-method {method} --recompute-num-layers 6")
        assert found == pytest.approx(inputs * tokens * 1024 * 2 + whole * layer, rel=1e-2)


def test_the_command_needs_neither_torch_nor_megatron(paper: Path) -> None:
    """In a process where importing either fails."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = None\n"
        "from megatron_router_upcycling.cli import main\n"
        f"sys.exit(main(['plan', {str(paper)!r}, '--gpus', '64', '--expert-model-parallel-size', '8']))"
    )
    done = launch.run(sys.executable, "-c", code).ok()
    assert "2.10 B parameters (2098086912), 852.38 M active a token" in done.text
    assert "DP 64; 1024 x 4096 tokens a step in 4 micro-batches of 4" in done.text


def test_no_argument_of_megatrons_is_taken_for_a_misspelt_one() -> None:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    options = add_megatron_arguments(ArgumentParser(allow_abbrev=False))._option_string_actions
    names = {option.lstrip("-").replace("-", "_") for option in options}
    read = {field.name for field in dataclasses.fields(setup.Setup)} | set(reading.NOT_COVERED)
    read |= set(reading.NEGATED)
    assert len(names) > 500
    with pytest.raises(UserError, match="must be at least 1"):  # and not "did you mean"
        reading.from_values(dict.fromkeys(names - read), {}, "Megatron")


def test_flops_are_megatrons(paper: Path) -> None:
    from argparse import Namespace

    from megatron.training.training import num_floating_point_operations

    made = reading.read(paper, None, ["--moe-layer-freq", "([0]+[1]*3)*6"], 64)
    assert made.has_experts() == [False, True, True, True] * 6

    class Arguments(Namespace):
        def __getattr__(self, name: str) -> None:
            """What is not given, such as mtp_num_layers, is off."""

    args = Arguments(**dataclasses.asdict(made) | {"group_query_attention": True})
    args.moe_shared_expert_intermediate_size = None
    expected = num_floating_point_operations(args, 1) / made.seq_length
    assert figures.flops_per_token(made) == pytest.approx(expected, rel=1e-3)


def test_a_file_may_be_named_by_a_flag(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "64", "--config", str(paper)]) == 0
    assert main(["plan", "--gpus", "64", "--num-layers", "24"]) == 2  # 24 is no file
    assert "--hidden-size 0: must be at least 1" in capsys.readouterr().err
