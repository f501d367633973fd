"""tools/experiments/demo.py: its plan and table, and from end to end on a tiny model (slow)."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_router_upcycling.training.run_log import files
from tests import launch, warm
from tools.experiments import demo, foundation
from tools.experiments.comparison import read
from tools.experiments.demo import Model
from tools.experiments.foundation import environment
from tools.experiments.results import RunResult
from tools.experiments.stages import Pipeline

UPCYCLED = ("router upcycling", "vanilla upcycling")


def plan_in(output: Path) -> demo.Demonstration:
    return demo.Demonstration(read(demo.COMPARISON, output), quick=True)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_single_gpu_is_used_by_one_rank(gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundation, "gpus", lambda: [str(number) for number in range(gpus)])
    stages = plan_in(Path("somewhere")).stages()
    verbs = ("convert", "evaluate", "train")
    names = [stage.name.split("-")[0] for stage in stages]
    assert names == ["corpus", "dense", "key_stats", *verbs, *verbs, "export", "check"]
    started = [stage for stage in stages if "megatron_router_upcycling." in str(stage.command)]
    assert len(started) == 6
    for stage in started:
        assert (f"--nproc-per-node {ranks} " in " ".join(stage.command)) == (ranks > 1)
        has_experts = stage.name not in ("dense", "key_stats")
        assert ("--expert-model-parallel-size" in stage.command) == (has_experts and ranks == 1), stage.name
    assert environment().get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_gpus_that_are_hidden_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: another'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert foundation.gpus.__wrapped__() == ["0", "1"]
    for visible in ("", "1", "1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert foundation.gpus.__wrapped__() == list(visible.replace(",", ""))


def test_disk_use_does_not_count_what_is_linked(tmp_path):
    source, made = tmp_path / "dense", tmp_path / "moe"
    source.mkdir()
    made.mkdir()
    (source / "a").write_bytes(b"x" * 1000)
    os.link(source / "a", made / "a")
    (made / "b").write_bytes(b"y" * 30)
    assert demo.disk_use(made, source) == (30, 1030)


def test_table_and_results_have_a_row_for_each_model():
    run = RunResult("router upcycling", 1, 4.6789, {2000: 4.7}, 2500, 25, {}, {}, 60.0, "command", "1234abc")
    dense = Model("dense", replace(run, name="dense", held_out=4.95))
    models = [dense, Model(run.name, run, 5.5, 1.5, 1.25, 3.21, 2_500_000, 31_000_000)]
    lines = demo.table(models).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["dense", "–", "4.9500", "–", "–", "–", "–"]
    assert cells[3] == ["router upcycling", "5.5000", "4.6789", "1.50", "1.25", "3.2 s", "2.50 of 31.00 MB"]
    found = json.loads(json.dumps(demo.as_json(models)))
    assert found["models"][1]["loss_at_end"] == 4.6789
    assert found["curves"]["router upcycling"]["training"]["20"] == 4.7


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    command = (warm.PYTHON, "-m", "tools.experiments.demo", "--quick", "--output", output)
    launch.run(*command, cwd=launch.ROOT, timeout=550).ok()
    return output


@pytest.mark.slow
def test_table_holds_what_was_measured(finished):
    found = json.loads((finished / "results.json").read_text())
    models = {model["name"]: model for model in found["models"]}
    assert list(models) == ["dense", *UPCYCLED]
    assert models["dense"]["loss_at_end"] < math.log(500)  # a random guess's
    for name in UPCYCLED:
        model = models[name]
        # The experts' weights sum to less than 1 at first, so the loss is near the dense model's, not at it.
        assert 0 < abs(model["loss_at_start"] - models["dense"]["loss_at_end"]) < 0.5
        assert model["loss_at_end"] < model["loss_at_start"]
        assert 1 <= model["load_at_start"] <= 8 and 1 <= model["load_at_end"] <= 8
        assert 0 < model["bytes_added"] < model["bytes_named"]
    assert models["router upcycling"]["loss_at_end"] != models["vanilla upcycling"]["loss_at_end"]
    assert (finished / "loss_curves.png").stat().st_size > 10_000
    plan = plan_in(finished)
    table = demo.table(demo.collect(Pipeline(finished, environment()), plan))
    assert table in (finished / "report.md").read_text()
    # Both were trained on the same tokens: their losses before any step differ by the router alone.
    first = [found["curves"][name]["training"]["1"] for name in UPCYCLED]
    assert first[0] != first[1] and abs(first[0] - first[1]) < 0.05
    for stage in (plan.train(*run) for run in plan.runs()):  # every token goes to two experts
        begin, *_, end = files.read(stage.output / files.ROUTING)
        assert (begin["iteration"], end["iteration"]) == (1, 6)
        for line in (begin, end):
            assert [sum(shares) for shares in line["load"]] == pytest.approx([1, 1])
            assert line["dropped_fraction"] == [0, 0]


@pytest.mark.slow
def test_what_training_saved_is_what_it_had(finished, tmp_path):
    """A trained model is evaluated at the end of its run, and here again from the checkpoint that it left."""
    plan = plan_in(finished)
    for run in plan.runs():
        trained = plan.train(*run).output
        loads = {str(plan.convert(*run).output): str(trained), str(plan.evaluate(*run).output): str(tmp_path)}
        words = [loads.get(word, word) for word in plan.evaluate(*run).command]
        flags = words[words.index("megatron_router_upcycling.pretrain") + 1 :]
        launch.ranks(plan.ranks, "pretrain", *flags).ok()
        before, after = (files.read(folder / files.RUN)[-1] for folder in (trained, tmp_path))
        assert before["kind"] == after["kind"] == "held_out"
        assert before["lm_loss"] == after["lm_loss"]
    checked = json.loads((finished / "check.json").read_text())
    exported = files.read(plan.exported().output / files.RUN)[-1]["lm_loss"]
    assert [checked["megatron"], checked["transformers"]] == pytest.approx([exported, exported], rel=1e-5)
