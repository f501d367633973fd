"""compare.py: what a file may say, how claims are judged, and a comparison that is killed half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.run_log import files
from tests.training.test_methods import over_the_tests_model
from tools.experiments import compare, report
from tools.experiments.comparison import Claim, read
from tools.experiments.plan import Plan
from tools.experiments.report import RunResult

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs/compare").glob("*.yaml"))
CLAIM = Claim("a", "b", "somebody")


def runs(**losses: list[float]) -> list[RunResult]:
    """Results of runs by name, with a held-out loss for seed 1, 2, ..."""
    return [
        RunResult(name, seed, loss, {4096: 5.0, 8192: 4.0}, 8192, 2, {}, {}, 60.0, "command")
        for name, found in losses.items()
        for seed, loss in enumerate(found, start=1)
    ]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([4.0, 5.0, 6.0], [4.1, 5.11, 6.12], "shown"),  # the seeds differ by more than the runs do
        ([4.1, 5.11, 6.12], [4.0, 5.0, 6.0], "contradicted"),
        ([4.0, 5.0, 6.0], [4.1, 4.9, 6.1], "not shown"),  # not with every seed
        ([4.0, 5.0, 6.0], [4.01, 5.3, 6.02], "not shown"),  # within two standard errors
        ([4.0, 5.0], [4.0, 5.0], "not shown"),
        ([4.0], [5.0], "not judged"),
    ],
)
def test_verdict(a: list[float], b: list[float], word: str) -> None:
    sentence = report.verdict(CLAIM, runs(a=a, b=b))
    assert (f"**{word} at" in sentence) if word != "not judged" else (word in sentence)


def test_differences_are_of_one_seed() -> None:
    found = runs(a=[4.0, 5.0, 6.0], b=[4.5, 5.25])
    assert report.differences(found, "a", "b") == [-0.5, -0.25]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_in_the_repository_plan(path: Path) -> None:
    comparison = read(path)
    plan = Plan(comparison, Path("somewhere"))
    stages = plan.stages()
    trained = [stage for stage in stages if stage.name.startswith("train-")]
    assert len(trained) == len(comparison.runs) * len(comparison.seeds)
    assert len({stage.name for stage in stages}) == len(stages)
    done: set[str] = set()
    for stage in stages:
        assert {earlier.name for earlier in stage.after} <= done, stage.name
        done.add(stage.name)
    # One data order: with one seed, training differs in its configuration and its checkpoint alone.
    for seed in comparison.seeds:
        commands = [plan.train(name, seed).command for name in comparison.runs]
        assert all(f"--seed {seed} --load" in " ".join(command) for command in commands)


def test_an_existing_checkpoint_is_the_start(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_experts: 4\n")
    (tmp_path / "c.yaml").write_text(
        "checkpoint: dense\nkey_stats: keys\nseeds: [7]\nlauncher: srun launch.sh\n"
        "flags: {train_iters: 5, bf16: true}\nruns: {one: run.yaml}\n"
    )
    plan = Plan(read(tmp_path / "c.yaml"), tmp_path / "out")
    convert, train = (" ".join(stage.command) for stage in plan.stages())
    assert f"convert {tmp_path / 'dense'}" in convert and f"--key-stats {tmp_path / 'keys'}" in convert
    assert train.startswith("srun launch.sh -m megatron_router_upcycling.pretrain")
    assert "--train-iters 5 --bf16 --seed 7" in train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: {}", "needs 'runs:'"),
        ("dense: d.yaml\nruns: {a: r.yaml}\nseed: [1]", "unknown entry 'seed'"),
        ("dense: d.yaml\nruns: {a: r.yaml}\nseeds: [1, 1]", "different whole numbers"),
        ("runs: {a: r.yaml}", "either 'dense:'"),
        ("checkpoint: d\nruns: {a: r.yaml}", "needs 'key_stats:' beside it"),
        ("dense: d.yaml\nruns: {a: r.yaml}\nreference: b", "'b' is none of the runs"),
        ("dense: d.yaml\nruns: {a: missing.yaml}", "no such file"),
        ("dense: d.yaml\nruns: {a: r.yaml}\nclaims: [{better: a}]", "claims"),
        ("- x", "needs 'runs:'"),
        ("{", "cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text("num_experts: 4\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [[], ["--bogus"], ["nowhere.yaml"]])
def test_mistakes_on_the_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_run_is_read_from_what_it_wrote(tmp_path: Path) -> None:
    def line(iteration: int, **entries: object) -> dict:
        return {"iteration": iteration, "tokens": 4096 * iteration, **entries}

    for found in (
        line(1, kind="train", lm_loss=8.0),
        line(2, kind="train", lm_loss=7.0),
        line(2, kind="held_out", set="test", lm_loss=9.0),
        line(2, kind="train", lm_loss=6.0),  # once more, after a crash
        line(2, kind="held_out", set="validation", lm_loss=6.5),
    ):
        files.append(tmp_path / files.RUN, found)
    record = {"seconds": 60.0, "command": "command"}
    for loads in ([3.0, 2.0], [2.0, 1.0], [1.0, 1.5]):
        files.append(tmp_path / files.ROUTING, line(1, layers=[0, 1], load_max_over_mean=loads))
    found = report.read_run("a", 1, tmp_path, record)
    assert (found.held_out, found.tokens, found.steps) == (6.5, 8192, 2)
    assert found.training == {4096: 8.0, 8192: 6.0}
    assert found.first_routing == {"load_max_over_mean": 2.5}
    assert found.routing == {"load_max_over_mean": 1.25}
    (tmp_path / files.RUN).write_text("")
    with pytest.raises(UserError, match="no finite held-out loss"):
        report.read_run("a", 1, tmp_path, record)


def test_report_names_every_run(tmp_path: Path) -> None:
    comparison = replace(read(FILES[0]), seeds=(1, 2), claims=(), paper={}, reference="b")
    comparison = replace(comparison, runs={"a": Path("a"), "b": Path("b"), "not begun": Path("c")})
    text = report.write(comparison, runs(a=[4.0, 5.0], b=[4.5, 5.25]), tmp_path / "out", "command")
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "a", "4.5000 ± 0.7071", "-0.3750 ± 0.1768"] in [row[:4] for row in cells]
    assert "4 of 6 runs have ended" in text
    assert (tmp_path / "out/loss_curves.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "out/results.json").read_text())["runs"]) == 4


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path, dense: Path, key_stats_file: Path, moe_config: Path) -> None:
    """A comparison ended by SIGKILL in a training goes on from there, and every run has ended once."""
    for method in ("locmoe", "mlp"):
        over_the_tests_model(tmp_path, method, moe_config, expert_model_parallel_size=2)
    file, output = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(
        f"checkpoint: {dense}\nkey_stats: {key_stats_file}\nseeds: [1]\n"
        "flags: {train_iters: 40, save_interval: 20}\nruns: {locmoe: locmoe.yaml, mlp: mlp.yaml}\n"
    )
    command = [sys.executable, "-m", "tools.experiments.compare", str(file), "--output", str(output)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    log, deadline = output / "logs/train-locmoe-1.log", time.monotonic() + 300
    while not (log.exists() and "iteration       22/" in log.read_text()):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 300
    while (again := subprocess.run(command, cwd=ROOT, capture_output=True, text=True)).returncode:
        # Ranks that outlived their parent hold the folder's lock until they end.
        assert "another run is at work there" in again.stderr and time.monotonic() < deadline, again.stderr
        time.sleep(1)
    assert again.stdout.count("done before") == 1  # locmoe's conversion
    assert log.read_text().count("iteration       20/") == 1  # nor was its training begun again
    results = json.loads((output / "two/results.json").read_text())["runs"]
    assert sorted(result["name"] for result in results) == ["locmoe", "mlp"]
    assert all(result["held_out"] > 0 and result["routing"]["load_max_over_mean"] >= 1 for result in results)
