"""Megatron's CUDA path from end to end, on a device that is pretended (tests/pretend_gpu)."""

import json
import sys
from pathlib import Path

import pytest

from megatron_router_upcycling.checkpoint import open
from tests import launch, pretend_gpu
from tests.conftest import LAYERS, expert_parallel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pretend_gpu.missing() is not None, reason=str(pretend_gpu.missing())),
]
ON_GPU = ("-m", "tests.pretend_gpu")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pretend_gpu.environment(tmp_path_factory.mktemp("pretended"))


def test_training_has_the_losses_of_the_cpu(
    gpu: dict[str, str], moe_config: Path, moe: Path, unbroken: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    """EP 2 with overlapped communication; checkpoints written by a process apart, which maps GPU memory."""
    save = tmp_path / "run"
    output = launch.run(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2),
        *("--master-addr", "127.0.0.1", "--master-port", launch.free_port()),
        *(*ON_GPU, "-m", "megatron_router_upcycling.pretrain", *expert_parallel(moe_config, moe)),
        *("--save", save, "--distributed-backend", "gloo", "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--async-save", "--async-strategy", "mcore", "--use-persistent-ckpt-worker"),
        **gpu,
    ).ok()
    assert "GPU without Transformer Engine: set transformer_impl=local" in output.text
    assert output.losses == pytest.approx(unbroken[1], rel=1e-5)
    assert (save / "run_state").read_text() == "finished\n"
    open.check_whole(save)


def test_cuda_graphs_take_the_mixtures_routers(
    gpu: dict[str, str], moe_config: Path, moe: Path, tmp_path: Path
) -> None:
    """They are captured: nothing in them waits for the GPU. (A replay does nothing here.)"""
    graphs = ("--cuda-graph-impl", "local", "--cuda-graph-modules", "attn", "moe_router", "--te-rng-tracker")
    load = ("--config", moe_config, "--load", moe, "--save", tmp_path / "run", "--train-iters", 2)
    flags = (*load, *graphs, "--distributed-backend", "gloo", "--no-check-for-nan-in-loss-and-grad")
    command = (sys.executable, *ON_GPU, "-m", "megatron_router_upcycling.pretrain", *flags)
    output = launch.run(*command, **gpu).ok()
    count = 2 * LAYERS  # forward and backward of each
    assert f" {count}/{count} [" in output.text and "create cuda graphs" in output.text
    assert "routing diagnostics: none" in output.text


def test_the_papers_run_steps_with_both_routers(gpu: dict[str, str], tmp_path: Path) -> None:
    """All flags of its configuration at a narrow width: bfloat16, grouped experts, one rank of 64."""
    narrow = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4"
    narrow += " --num-query-groups 4 --kv-channels 16 --vocab-size 256 --padded-vocab-size 256"
    figures = tmp_path / "figures.json"
    flags = (*narrow.split(), "--rehearse-seq-length", 64, "--rounds", 1, "--output", figures)
    bench = launch.ROOT / "tools" / "benchmarks" / "bench_step.py"
    output = launch.run(sys.executable, *ON_GPU, bench, *flags, **gpu).ok()
    assert "create_attention_mask_in_dataloader=False" in output.text
    found = json.loads(figures.read_text())
    assert found["hardware"] == "pretended GPU" and found["grouped_experts"]
    assert all(size > 2**20 for size in found["peak_bytes"].values())  # PyTorch's CUDA allocator counts them
