"""The step benchmark runs on the CPU at small size and says what it ran on."""

import json
from pathlib import Path

import pytest
import torch

from tests import launch
from tools.benchmarks import step_parts


def test_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    tool = launch.ROOT / "tools" / "benchmarks" / "bench_step.py"
    flags = ("--num-layers", 2, "--vocab-size", 256, "--rehearse-seq-length", 32, "--gpus", 4)
    done = launch.python(tool, "--rounds", 2, "--output", output, *flags).ok()
    found = json.loads(output.read_text())
    assert "(no GPU)" in found["hardware"] and found["utilisation"] == {"mixture": None, "stock": None}
    assert found["micro_batch"] == [4, 32] and found["versions"]["megatron-core"]
    assert "bench_step.py --rounds 2" in found["command"]
    for kind in ("mixture", "stock"):
        seconds = found["step_seconds"][kind]
        assert found["tokens_per_second"][kind] == pytest.approx(4 * 32 / seconds)
        assert 0 < found["router_share"][kind] < 1
    assert f"mixture's throughput over stock's: {found['throughput_ratio']:.4f}" in done.text


def test_layers_in_cuda_graphs_are_one_part() -> None:
    """A replay does not tell the kernels of a layer's parts from each other."""
    core_attention = torch.nn.Linear(4, 4)
    model = [torch.nn.ModuleDict({"core_attention": core_attention})]

    def parts(labelled: bool) -> set[str]:
        step = lambda: core_attention(torch.ones(2, 4)).sum().backward()  # noqa: E731
        return set(step_parts.measure(step, model, runs=1, labelled=labelled)["parts"])

    assert "attention" in parts(True) and step_parts.IN_GRAPHS not in parts(True)
    assert step_parts.IN_GRAPHS in parts(False) and not {"attention", step_parts.OTHER} & parts(False)
