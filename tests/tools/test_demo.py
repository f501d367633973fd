"""tools/experiments/demo.py from end to end, on a tiny model: every command really runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tools.experiments import demo, demo_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.experiments.demo", "--quick", "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    ended = run(output)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return output


def test_table_holds_what_was_measured(finished):
    models = {model["name"]: model for model in json.loads((finished / "results.json").read_text())["models"]}
    assert list(models) == ["dense", *demo.UPCYCLED]
    random_guess = math.log(500)
    assert models["dense"]["loss_at_end"] < random_guess
    for name in demo.UPCYCLED:
        model = models[name]
        # The experts' weights sum to less than 1 at first, so the loss is near the dense model's, not at it.
        assert 0 < abs(model["loss_at_start"] - models["dense"]["loss_at_end"]) < 0.5
        assert model["loss_at_end"] < model["loss_at_start"]
        assert 1 <= model["load_at_start"] <= 8 and 1 <= model["load_at_end"] <= 8
        assert 0 < model["bytes_added"] < model["bytes_named"]
    assert models["router upcycling"]["loss_at_end"] != models["vanilla upcycling"]["loss_at_end"]
    table = demo_report.table([demo_report.ModelResult(**model) for model in models.values()])
    assert table in (finished / "report.md").read_text()
    assert (finished / "loss_curves.png").stat().st_size > 10_000


def test_every_token_goes_to_two_experts(finished):
    tokens = 2 * 16 * 256  # evaluation batches, sequences in a batch, tokens in a sequence
    for path in finished.glob("load-*.json"):
        layers = json.loads(path.read_text())["tokens_per_expert"]
        assert [sum(layer) for layer in layers] == [2 * tokens] * 2
    assert len(list(finished.glob("load-*.json"))) == 4


def test_both_were_trained_on_the_same_tokens(finished):
    """Their first training losses, before any step, differ by the router alone."""
    curves = json.loads((finished / "results.json").read_text())["curves"]
    first = [curves[name]["training"]["1"] for name in demo.UPCYCLED]
    assert first[0] != first[1] and abs(first[0] - first[1]) < 0.05


def test_what_training_saved_is_what_it_had(finished):
    """A trained model is evaluated at the end of its run, and again from the checkpoint that it left."""
    for router in demo.UPCYCLED.values():
        logs = [finished / "logs" / f"{name}.log" for name in (f"train-{router}", f"evaluate-{router}-end")]
        before, after = (demo_report.parse_log(log.read_text()).held_out for log in logs)
        assert before == after


def test_second_run_does_nothing_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.distcp")}
    assert before
    ended = run(finished)
    assert ended.returncode == 0, ended.stderr
    number = len(demo.plan(finished, quick=True).stages())
    assert ended.stdout.count("done before") == number
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.distcp")} == before


def test_plan_reads_only_what_an_earlier_stage_makes():
    done: set[str] = set()
    for stage in demo.plan(Path("somewhere"), quick=False).stages():
        assert {earlier.name for earlier in stage.after} <= done, stage.name
        assert all(path.is_file() for path in (ROOT / file for file in stage.files))
        done.add(stage.name)
