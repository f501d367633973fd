"""The check of a GPU runs on the CPU at a small size, and says what it could not run there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launch

pytestmark = pytest.mark.slow
TOOL = launch.ROOT / "tools" / "benchmarks" / "gpu_check.py"
PATIENT = ("--limit", "train", "900", "--limit", "steps", "400", "--limit", "kernels", "600")


def check(output: Path, *flags: object) -> tuple[int, str, dict[str, Any], str]:
    """Exit status, what it printed, and its two reports; all it is given is PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--output", str(output), *map(str, flags)],
        env=os.environ | {"PYTHONPATH": str(launch.ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2000,
        cwd=output.parent,
    )
    found = json.loads((output / "report.json").read_text())
    return done.returncode, done.stdout, found, (output / "report.md").read_text()


def test_whole_check_on_the_cpu(tmp_path: Path) -> None:
    status, printed, found, page = check(tmp_path / "out", *PATIENT)
    assert status == 0, printed
    assert {name: part["outcome"] for name, part in found["parts"].items()} == {
        "train": "ok",
        "steps": "ok",
        "kernels": "ok",
    }
    assert "(no GPU)" in found["hardware"] and found["size"] == "small"
    assert found["versions"]["megatron-core"] and "gpu_check.py" in found["command"]
    checks = {entry["name"]: entry for part in found["parts"].values() for entry in part["checks"]}
    losses = checks["train on the CPU"]["figures"]["losses"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    resumed = checks["resume from CPU on CPU"]["figures"]
    assert len(resumed["losses"]) == 6 and resumed["from the unbroken run's"] < 2e-3
    exported = checks["transformers' loss of the export from CPU on CPU"]["figures"]
    assert exported["megatron"] == pytest.approx(exported["transformers"], rel=1e-3)
    assert checks["CPU, micro-batch 4"]["figures"]["mixture over stock"] > 0
    assert checks["bench_router"]["figures"]["folded over stock"] > 0
    assert checks["bench_collect_keys"]["figures"]["collecting over plain"] > 0
    missing = "\n".join(f"{entry['what']}: {entry['why']}" for entry in found["not_run"])
    for what in ("CUDA graphs", "NCCL", "Transformer Engine", "saving while training goes on"):
        assert what in missing and what in page
    for name in checks:
        assert f"| {name} | ok |" in page
        assert f"] {name}: ok" in printed


def test_part_that_fails_stops_nothing_else(tmp_path: Path) -> None:
    flags = ("--parts", "train", "steps", "--limit", "train", "0.5", "--limit", "steps", "400")
    status, printed, found, page = check(tmp_path / "out", *flags)
    assert status == 1
    assert found["parts"]["train"]["outcome"] == "failed"
    assert "its limit is over" in found["parts"]["train"]["checks"][0]["note"]
    assert found["parts"]["steps"]["outcome"] == "ok", printed
    assert {"what": "kernels", "why": "not asked for (--parts)"} in found["not_run"]
    assert "## train: failed" in page and "## steps: ok" in page
