"""scripts/launch.sh: what it sets for the processes that it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch


@pytest.mark.parametrize(
    ("entries", "flags", "given", "expected"),
    [
        ("lr: 1.0e-4", (), None, None),
        ("expert_model_parallel_size: 8", ("--use-distributed-optimizer",), None, None),
        ("tensor_model_parallel_size: 2", (), None, "1"),
        ("base: cut.yaml", (), None, "1"),
        ("tensor_model_parallel_size: 2", ("--tensor-model-parallel-size", "1"), None, None),
        ("lr: 1.0e-4", ("--context-parallel-size=2",), None, "1"),
        ("tensor_model_parallel_size: 2", (), "8", "8"),
    ],
)
def test_one_hardware_queue_only_where_the_order_of_launches_matters(
    tmp_path: Path, entries: str, flags: tuple[str, ...], given: str | None, expected: str | None
) -> None:
    (tmp_path / "cut.yaml").write_text("tensor_model_parallel_size: 2\n")
    config = tmp_path / "run.yaml"
    config.write_text(entries + "\n")
    # A Python that shows its environment instead of starting torchrun.
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *torch.distributed.run*) env ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= {"PYTHON": str(python)} | ({"CUDA_DEVICE_MAX_CONNECTIONS": given} if given else {})
    command = [launch.ROOT / "scripts" / "launch.sh", "--standalone", "pretrain", config, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert found.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
