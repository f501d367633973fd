"""Megatron's CUDA path from end to end, on a device that is pretended (tests/pretend_gpu)."""

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_router_upcycling.checkpoint import open
from megatron_router_upcycling.training.run_log import files
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
        **gpu | {"PYTHON_EXEC": sys.executable},  # ranks that begin anew
    ).ok()
    assert "GPU without Transformer Engine: set transformer_impl=local" in output.text
    assert "; no CUDA graphs, which are not known to work with moe_grouped_gemm=False" in output.text
    assert output.losses == pytest.approx(unbroken[1], rel=1e-5)
    assert (save / "run_state").read_text() == "finished\n"
    open.check_whole(save)


def train(gpu: dict[str, str], save: Path, *flags: object) -> launch.Output:
    """Two data-parallel ranks, with evaluations between their steps."""
    often = ("--eval-interval", 3, "--eval-iters", 1, "--routing-diagnostics-interval", 2, "--train-iters", 6)
    return launch.run(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2),
        *("--master-addr", "127.0.0.1", "--master-port", launch.free_port()),
        *(*ON_GPU, "-m", "megatron_router_upcycling.pretrain", "--save", save, *often, *flags),
        *("--bf16", "--moe-grouped-gemm", "--distributed-backend", "gloo", "--use-distributed-optimizer"),
        *("--overlap-grad-reduce", "--overlap-param-gather", "--global-batch-size", 16),
        **gpu,
    ).ok()


@pytest.mark.parametrize(("experts_on", "parts"), [(1, 1), (2, 2)], ids=["whole layers", "EP 2"])
def test_a_run_in_graphs_writes_what_an_eager_one_does(
    experts_on: int, parts: int, gpu: dict[str, str], moe_config: Path, moe: Path, tmp_path: Path
) -> None:
    """Graphs are the default. A replay runs no Python, and evaluations replay what training captured."""
    load = ("--config", moe_config, "--load", moe, "--expert-model-parallel-size", experts_on)
    graphs = train(gpu, tmp_path / "graphs", *load)
    eager = train(gpu, tmp_path / "eager", *load, "--cuda-graph-impl", "none")
    assert "cuda_graph_impl=local" in graphs.text and "cuda_graph" not in eager.text
    count = parts * 2 * LAYERS  # forward and backward of each layer, or of its attention and its router
    assert f" {count}/{count} [" in graphs.text and "create cuda graphs" not in eager.text
    assert graphs.losses == eager.losses and len(graphs.losses) == 6
    for losses in ("load_balancing_loss", "z_loss"):
        logged = [re.findall(rf"{losses}: (\S+)", run.text) for run in (graphs, eager)]
        assert logged[0] == logged[1] and len(logged[0]) == 6
    for name in (files.RUN, files.ROUTING):
        lines = [files.read(tmp_path / run / name) for run in ("graphs", "eager")]
        for line in (line for run in lines for line in run):
            line.pop("time", None)
        assert lines[0] == lines[1]
    assert [line["iteration"] for line in lines[0]] == [1, 2, 4, 6]
    first, last = (line["rare"]["router_agreement"] for line in (lines[0][0], lines[0][-1]))
    assert first != last


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
