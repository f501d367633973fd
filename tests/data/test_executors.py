"""data/executors.py: tasks as array jobs of Slurm; scripts stand for Slurm's commands and run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import small
from tests.repository import ROOT

COMMANDS = {
    "sbatch": """#!/bin/bash
for script; do :; done  # the last argument
echo "$@" >> {folder}/submitted; cat "$script" > {folder}/script
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export RUN_OFFSET=0 SLURM_NODELIST=here
for task in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$task bash "$script" > {folder}/out 2>&1; done
echo Submitted batch job 7
""",
    "srun": """#!/bin/bash
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
""",
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": "#!/bin/bash\n",
    "scancel": '#!/bin/bash\necho "$@" >> {folder}/cancelled\n',
}


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(script.replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def prepare(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    slurm = ("--slurm", "partition=cpu", "--slurm", "time=1:00:00", "--slurm", "account=me")
    start = (sys.executable, "-m", "megatron_router_upcycling.cli", "prepare-data")
    command = map(str, (*start, *words, "--executor", "slurm", *slurm, "--quiet"))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_tasks_are_submitted_and_their_parts_joined(slurm, tmp_path):
    text = small.lines(tmp_path / "a.jsonl", small.documents(60))
    place = small.hugging_face(tmp_path / "qwen")
    done = prepare(slurm, text, "--tokenizer", place, "--output", tmp_path / "out/data")
    assert (done.returncode, done.stderr) == (0, "")
    assert small.run(text, "--tokenizer", place, "--output", tmp_path / "here/data", "--workers", 1) == 0
    for name in ("data.bin", "data.idx", "data.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    script = (tmp_path / "slurm/script").read_text()
    for line in ("partition=cpu", "time=1:00:00", "account=me", "array=0-0"):
        assert f"#SBATCH --{line}" in script


def test_what_a_task_says_is_said_and_a_job_without_result_named(slurm, tmp_path):
    text, place = small.lines(tmp_path / "a.csv", ["a"]), small.hugging_face(tmp_path / "qwen")
    text.write_bytes(b"text\n\xff\n")
    words = (text, "--tokenizer", place, "--output", tmp_path / "data")
    bad = prepare(slurm, *words)
    assert bad.returncode == 2 and bad.stderr.startswith(f"error: SOURCE {text}: cannot be read")
    assert bad.stderr.count("\n") == 1
    (tmp_path / "slurm/srun").write_text("#!/bin/bash\nexit 1\n")
    lost = prepare(slurm, *words)
    assert lost.returncode == 2 and "run the same command again to resume" in lost.stderr
    assert "error: --executor slurm: job 7 has ended without 1 of its tasks" in lost.stderr
    assert (tmp_path / "slurm/cancelled").read_text().count("--name=prepare-data-") == 2
    (tmp_path / "slurm/sbatch").write_text("#!/bin/bash\nexit 1\n")
    assert "error: --executor slurm: Slurm cannot be used" in prepare(slurm, *words).stderr
    assert Path(tmp_path / "slurm/submitted").read_text().count("RUN_OFFSET=0") == 2
