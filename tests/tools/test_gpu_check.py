"""The check of a GPU and the step benchmark run on the CPU at a small size, and say what they ran on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launch, warm
from tests.layers import one_rank, test_dispatch
from tools.benchmarks import candidates, step_parts

PARTS = ("parallel", "transformer-engine", "steps", "train", "kernels")
TOOLS = launch.ROOT / "tools" / "benchmarks"
PATIENT = [word for part in ("parallel", "steps", "train", "kernels") for word in ("--limit", part, 900)]
PATIENT += ["--seconds", 3600]


def command(output: Path, *flags: object, python: str = warm.PYTHON) -> dict[str, Any]:
    """Of a check, all that it is given is PYTHONPATH."""
    words = [python, str(TOOLS / "gpu_check.py"), "--output", str(output), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(launch.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {"args": words, "env": environment, "text": True, "cwd": output.parent}


def check(output: Path, *flags: object) -> tuple[int, str, dict[str, Any], str]:
    """Exit status, what it printed, and its two reports."""
    done = subprocess.run(**command(output, *flags), capture_output=True, timeout=2000)
    found = json.loads((output / "report.json").read_text())
    return done.returncode, done.stdout + done.stderr, found, (output / "report.md").read_text()


def test_help_lists_the_parts_in_the_order_of_their_worth(tmp_path: Path) -> None:
    said = subprocess.run(
        **command(tmp_path / "out", "--help", python=sys.executable), capture_output=True
    ).stdout
    places = [said.index(f"\n{part}") for part in PARTS]
    assert places == sorted(places)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    for limit, said in (("steps much", "--limit much: give a number of"), ("no 3", "--limit no: the parts")):
        done = subprocess.run(**command(tmp_path / "out", "--limit", *limit.split()), capture_output=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_check_that_is_killed_leaves_its_page(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(**command(output, "--parts", "parallel"), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "report.md").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    page = (output / "report.md").read_text()
    assert ", not ended)" in page and "| convert a dense model | ok |" in page
    assert "- steps: not asked for (--parts), or not yet" in page


@pytest.mark.slow
def test_whole_check_on_the_cpu(tmp_path: Path) -> None:
    status, printed, found, page = check(tmp_path / "out", *PATIENT)
    assert status == 0, printed
    outcomes = {name: part["outcome"] for name, part in found["parts"].items()}
    assert outcomes == dict.fromkeys(PARTS, "ok") | {"transformer-engine": "not run"}
    assert list(outcomes) == list(PARTS)
    assert "(no GPU)" in found["hardware"] and found["size"] == "small"
    assert found["versions"]["megatron-core"] and "gpu_check.py" in found["command"]
    checks = {entry["name"]: entry for part in found["parts"].values() for entry in part["checks"]}
    losses = checks["train on the CPU"]["figures"]["losses"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    resumed = checks["resume from CPU on CPU"]["figures"]
    assert len(resumed["losses"]) == 6 and resumed["from the unbroken run's"] < 2e-3
    exported = checks["transformers' loss of the export from CPU on CPU"]["figures"]
    assert exported["megatron"] == pytest.approx(exported["transformers"], rel=1e-3)
    for name, ratio in (
        ("eager, micro-batch 4", "mixture over stock"),
        ("bench_router", "folded over stock"),
    ):
        assert checks[name]["figures"][ratio] > 0
    missing = "\n".join(f"{entry['what']}: {entry['why']}" for entry in found["not_run"])
    for what in ("CUDA graphs", "NCCL", "Transformer Engine", "saving while training goes on"):
        assert what in missing and what in page
    for name in checks:
        assert f"| {name} | ok |" in page
        assert f"] {name}: ok" in printed
    for layout in ("EP 2, float32", "DP 2, float32", "TP 2, float32", "saved at EP 2, resumed at EP 1"):
        assert checks[layout]["figures"]["from one rank's, float32"] < 1e-5
    assert checks["two ranks"]["figures"]["over"] == "Gloo"
    # The same command carries on from its page.
    status, printed, again, page = check(tmp_path / "out", *PATIENT)
    assert status == 0 and "train: ok in an earlier call" in printed
    assert again["parts"]["train"]["checks"] == found["parts"]["train"]["checks"]
    assert "by an earlier `python" in page


@pytest.mark.slow
def test_part_that_fails_stops_nothing_else(tmp_path: Path) -> None:
    flags = ("--parts", "train", "steps", *PATIENT, "--limit", "train", "0.5")
    status, printed, found, page = check(tmp_path / "out", *flags)
    assert status == 1 and found["parts"]["train"]["outcome"] == "failed"
    assert "its limit is over" in found["parts"]["train"]["checks"][0]["note"]
    assert found["parts"]["steps"]["outcome"] == "ok", printed
    assert {"what": "kernels", "why": "not asked for (--parts), or not yet"} in found["not_run"]
    assert "## train: failed" in page and "## steps: ok" in page


def test_a_step_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    flags = ("--num-layers", 2, "--vocab-size", 256, "--rehearse-seq-length", 32, "--gpus", 4)
    flags += ("--try", "torch-math", "gradients-zeroed")
    done = launch.python(TOOLS / "bench_step.py", "--rounds", 2, "--output", output, *flags).ok()
    found = json.loads(output.read_text())
    assert "(no GPU)" in found["hardware"] and found["utilisation"] == {"mixture": None, "stock": None}
    assert found["micro_batch"] == [4, 32] and found["versions"]["megatron-core"]
    assert "bench_step.py --rounds 2" in found["command"]
    for kind in ("mixture", "stock"):
        seconds = found["step_seconds"][kind]
        assert found["tokens_per_second"][kind] == pytest.approx(4 * 32 / seconds)
        assert 0 < found["router_share"][kind] < 1
    assert f"mixture's throughput over stock's: {found['throughput_ratio']:.4f}" in done.text


def test_another_kernel_is_taken_only_if_it_is_right() -> None:
    right = torch.nn.functional.scaled_dot_product_attention
    assert candidates.difference("attention", right) < candidates.TOLERANCE
    wrong = candidates.difference("attention", lambda *args, **of: right(*args, **of | {"is_causal": False}))
    assert wrong > 0.1
    experts = candidates.CANDIDATES["all-experts"].make()
    assert candidates.difference("experts", experts) < candidates.TOLERANCE
    assert candidates.difference("experts", lambda x, probs, *of: experts(x, probs * 1.1, *of)) > 0.05
    assert candidates.missing("flash-attn-4") in (None, "flash_attn.cute")
    assert candidates.missing("sonic-moe") in (None, "sonicmoe")


def test_other_experts_compute_what_a_layer_does() -> None:
    """In a process of its own, with Megatron on the CPU."""
    launch.python("-c", "from tests.tools import test_gpu_check as t; t.compare_experts()").ok()


def compare_experts() -> None:
    one_rank.start()
    from megatron_router_upcycling.layers.dispatch import UpcycledMoELayer

    layer = test_dispatch.build(UpcycledMoELayer, 2, True)
    expected = test_dispatch.run(layer)
    candidates.take("all-experts")
    layer.zero_grad()
    found = test_dispatch.run(layer)
    assert "experts.linear_fc1_weight" in expected and layer.experts.forward.__module__ == candidates.__name__
    found["probs"] *= expected["probs"] != 0  # of those that a token did not choose a router takes none
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2 * test_dispatch.TOLERANCE)


def test_layers_in_cuda_graphs_are_one_part() -> None:
    """A replay does not tell the kernels of a layer's parts from each other."""
    core_attention = torch.nn.Linear(4, 4)
    model = [torch.nn.ModuleDict({"core_attention": core_attention})]

    def parts(labelled: bool) -> set[str]:
        step = lambda: core_attention(torch.ones(2, 4)).sum().backward()  # noqa: E731
        return set(step_parts.measure(step, model, runs=1, labelled=labelled)["parts"])

    assert "attention" in parts(True) and step_parts.IN_GRAPHS not in parts(True)
    assert step_parts.IN_GRAPHS in parts(False) and not {"attention", step_parts.OTHER} & parts(False)
