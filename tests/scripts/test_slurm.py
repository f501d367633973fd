"""The batch files under a real Slurm: from a Hugging Face folder to a trained mixture, over two requeues."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import hf_models, launch, slurm_cluster, warm
from tests.conftest import TRAINING
from tests.slurm_cluster import Cluster, wait_until

SCRIPTS = launch.ROOT / "scripts"
ITERATIONS = 80


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shell_scripts_are_clean() -> None:
    files = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("slurm/*"), launch.ROOT / ".ci" / "run"]
    assert len(files) >= 10
    checked = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder, and configurations beside it that stand on the clusters' own base."""
    alive = str(SCRIPTS.parent / "configs" / "base" / "staying_alive.yaml")
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(TRAINING))
    training = TRAINING | {"base": [alive], "train_iters": ITERATIONS, "save_interval": 20}
    parallel = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    routing = {"num_experts": 8, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(training | parallel | routing))
    return hf_models.make("qwen1.5", tmp_path / "hf", vocab_size=300)


def _submit(model: Path, data: Path, *options: object) -> list[object]:
    folder = model.parent
    named = {"work": folder / "work", "hf": model, "config": folder / "moe.yaml", "data": data}
    flags = [part for name, value in named.items() for part in (f"--{name}", value)]
    return [SCRIPTS / "submit.sh", *flags, "--nodes", 2, "--gpus-per-node", 0, *options]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.cluster() as running:
        yield running


@pytest.mark.slow
def test_chain_with_a_requeue_ends_as_an_unbroken_run(cluster: Cluster, model: Path, data: Path) -> None:
    work = model.parent / "work"
    stages = ("--stages", "import,keys,convert,train", "--keys-flags", "--collect-iters 2")
    submit = _submit(model, data, *stages, "--", "--tensorboard-log-interval", 1)
    job = re.findall(r"^train +job (\d+)", cluster.run(*submit).ok().text, re.MULTILINE)[0]
    log = work / "logs" / f"train-{job}.log"

    def said(pattern: str) -> bool:
        return log.exists() and re.search(pattern, log.read_text()) is not None

    def everything() -> str:
        logs = (path.read_text()[-3000:] for path in sorted((work / "logs").glob("*.log")))
        return "\n".join((*cluster.jobs(), *logs))

    def wait_for(pattern: str) -> None:
        wait_until(lambda: said(pattern) or not cluster.jobs(), everything)
        assert said(pattern), everything()

    # The signal that Slurm sends before the time limit, and later a crash after a checkpoint.
    wait_for(r"iteration +3/")
    cluster.run("scancel", "--signal=URG", job).ok()
    wait_for("train: stopped at iteration")
    first = launch.Output(0, log.read_text()).losses
    wait_for(r"iteration +45/")
    cluster.run("scancel", f"{job}.0").ok()
    wait_until(lambda: not cluster.jobs(), everything)

    text = log.read_text()
    stopped = int(re.findall(r"train: stopped at iteration (\d+)", text)[0])
    assert max(first) == stopped < 45 and text.count("train: back into the queue") == 2
    assert re.search(r"train: running at iteration [46]0\b", text)
    assert f"train: finished at iteration {ITERATIONS}" in text
    assert (work / "run" / "run_state").read_text() == "finished\n"
    assert list((work / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert "train     " + str(work / "run" / "run_state") + " is there" in cluster.run(*submit).ok().text

    flags = ("--config", work / "train.yaml", "--load", work / "moe", "--data-path", data)
    unbroken = launch.ranks(2, "pretrain", *flags).ok().losses
    assert list(unbroken) == list(range(1, ITERATIONS + 1))
    assert launch.Output(0, text).losses == unbroken


@pytest.mark.slow
def test_a_signal_to_the_launcher_alone_saves_and_ends_the_run(
    tmp_path: Path, moe_config: Path, moe: Path
) -> None:
    """As clusters deliver it that track processes by control groups; the one above signals every process."""
    save, log = tmp_path / "run", tmp_path / "log"
    signalled = ("--exit-signal-handler", "--exit-signal", "SIGURG", "--train-iters", "100000")
    command = (SCRIPTS / "launch.sh", "pretrain", moe_config, "--load", moe, "--save", save, *signalled)
    with log.open("w") as file:
        launcher = subprocess.Popen(
            [str(part) for part in (*command, "--save-interval", 100_000)],
            env=launch.ENVIRONMENT | {"PYTHON": sys.executable}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: "iteration        3/" in log.read_text(), log.read_text)
        launcher.send_signal(signal.SIGURG)
        assert launcher.wait(120) == 0
    finally:
        launcher.terminate()
        launcher.wait(60)
    assert (save / "run_state").read_text() == "stopped\n"
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "none.yaml"), "--config none.yaml: no such file"),
        (("--data", "nowhere"), "--data nowhere: no nowhere.bin and .idx"),
        (("--dense", "/not/there"), "--dense /not/there: no latest_checkpointed_iteration.txt there"),
        (("--stages", "keys,trian"), "--stages trian: not one of data, import, keys"),
        (("--nodes",), "--nodes: needs a value"),
    ],
)
def test_mistakes_are_found_before_the_queue(
    model: Path, data: Path, options: tuple[object, ...], message: str
) -> None:
    output = launch.run(*_submit(model, data, "--dry-run", *options), PYTHON=warm.PYTHON)
    assert output.returncode == 2
    assert len(output.errors) == 1 and output.errors[0].startswith(f"error: {message}")


def test_a_mixture_of_experts_is_not_converted(model: Path, data: Path) -> None:
    moe = hf_models.make("qwen3-moe", model.parent / "moe")
    output = launch.run(*_submit(model, data, "--dry-run", "--hf", moe), PYTHON=warm.PYTHON)
    assert output.returncode == 2 and [f"error: --hf {moe}: a Mixture-of-Experts already"] == [
        line.partition(";")[0] for line in output.errors
    ]


def test_dry_run_shows_jobs_chained_by_their_success(model: Path, data: Path) -> None:
    (model / "tokenizer.json").touch()
    options = ("--dry-run", "--gpus-per-node", 2, "--time", "1:00:00", "--", "--micro-batch-size", 2)
    commands = launch.run(*_submit(model, data, *options)).ok().text.splitlines()
    stages = ["import", "keys", "convert", "train", "evaluate"]
    assert [re.findall(r"/(\w+)\.sbatch", command) for command in commands] == [[stage] for stage in stages]
    for before, command in zip(stages, commands[1:], strict=False):
        assert f"--dependency=afterok:{before.upper()}" in command
    assert "--nodes=2" in commands[3] and "--time=1:00:00" in commands[3]
    assert "--gpus-per-node=2" in commands[3] and "gpus" not in commands[2]
    assert not (model.parent / "work").exists()


def test_jobs_find_what_was_named_from_another_folder_in_a_container_too(model: Path, data: Path) -> None:
    folder = model.parent
    (folder / "image.sqsh").touch()
    (model / "tokenizer.json").touch()
    queue = folder / "bin" / "sbatch"
    queue.parent.mkdir()
    queue.write_text(f"#!/bin/sh\nenv -0 >{folder}/environment; echo 1\n")
    queue.chmod(0o755)
    relative = os.path.relpath(data, folder)
    options = ("--container", "image.sqsh", "--data", f"0.3 {relative} 0.7 {relative}")
    command = [str(part) for part in _submit(model, data, *options)]
    path = f"{queue.parent}:{os.environ['PATH']}"
    subprocess.run(command, cwd=folder, env=launch.ENVIRONMENT | {"PATH": path}, check=True)
    job = dict(entry.split("=", 1) for entry in (folder / "environment").read_text().split("\0") if entry)
    assert job["DATA"].split() == ["0.3", str(data), "0.7", str(data)]
    assert job["CONTAINER_IMAGE"] == str(folder / "image.sqsh")
    mounts = f"source {SCRIPTS}/slurm/common.sh; CONTAINER_MOUNTS=/more:/there mounts"
    found = subprocess.check_output(["bash", "-euc", mounts], env=job, text=True)
    expected = [launch.ROOT, folder / "work", folder, data.parent]
    assert found.strip().split(",") == [*(f"{place}:{place}" for place in expected), "/more:/there"]
