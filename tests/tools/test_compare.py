"""compare.py: what a file may say, how claims are judged, and a comparison that is killed half-way."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.conversion.options import read_method
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.run_log import files
from tests import warm
from tools.experiments import claims, compare, foundation, report, results
from tools.experiments.comparison import Claim, Comparison, read
from tools.experiments.plan import QUICK_QUESTIONS, Plan
from tools.experiments.results import RunResult, differences, interval

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs/compare").glob("*.yaml"))
CLAIM = Claim("a", "b", "somebody")


def runs(**losses: list[float]) -> list[RunResult]:
    """Results of runs by name, with a held-out loss for seed 1, 2, ..."""
    return [
        RunResult(name, seed, loss, {4096: 5.0, 8192: 4.0}, 8192, 2, {}, {}, 60.0, "command", "1234abc")
        for name, found in losses.items()
        for seed, loss in enumerate(found, start=1)
    ]


def comparison_of(*names: str, **changes: Any) -> Comparison:
    """A comparison with runs of these names; the second is the reference."""
    paths = {name: Path(name) for name in names}
    plain = {"runs": paths, "reference": names[1], "paper": {}, "claims": (), "seeds": (1, 2)}
    return replace(read(FILES[0]), **plain | changes)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([4.0, 5.0, 6.0], [4.1, 5.11, 6.12], "shown"),  # the seeds differ by more than the runs do
        ([4.1, 5.11, 6.12], [4.0, 5.0, 6.0], "contradicted"),
        ([4.0, 5.0, 6.0], [4.1, 4.9, 6.1], "not shown"),  # not with every seed
        ([4.0, 5.0, 6.0], [4.01, 5.3, 6.02], "not shown"),  # with every seed, but too differently
        ([4.0, 5.0], [4.1, 5.12], "not shown"),  # 11 standard errors are not enough for two seeds
        ([4.0, 5.0], [4.0, 5.0], "not shown"),
        ([4.0], [5.0], "not judged"),
    ],
)
def test_verdict(a: list[float], b: list[float], word: str) -> None:
    claim, source, said, difference, lower, of_all = report.verdict(CLAIM, runs(a=a, b=b))
    assert (claim, source, said.strip("*"), of_all) == ("a < b", "somebody", word, "")
    if word != "not judged":
        losses = list(zip(a, b, strict=True))
        assert difference == str(interval([x - y for x, y in losses]))
        assert lower == f"{sum(x < y for x, y in losses)} of {len(a)}"


def test_intervals_differences_and_crossings() -> None:
    """By the quantiles of any table of Student's t: 12.706, 4.303 and (at 99%) 9.925."""
    assert str(interval([1.0, 2.0, 3.0])) == "+2.0000 [-0.4841, +4.4841]"
    assert interval([0.0, 2.0]).ends == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)
    wide = interval([1.0, 2.0, 3.0], 0.99).ends
    assert wide == pytest.approx((2 - 9.925 / 3**0.5, 2 + 9.925 / 3**0.5), abs=1e-3)
    assert str(interval([1.0])) == "+1.0000" and not interval([1.0]).excludes_zero
    # At 95% this claim is shown; at the 99.5% that ten claims ask for it is not.
    found = runs(a=[4.0, 5.0, 6.0], b=[4.1, 5.12, 6.15])
    assert [report.verdict(CLAIM, found, judged=judged)[-1] for judged in (1, 2, 10)] == ["", "yes", "no"]
    # Differences are of one seed; a crossing lies between two points.
    assert results.differences(runs(a=[4.0, 5.0, 6.0], b=[4.5, 5.25]), "a", "b") == [-0.5, -0.25]
    assert results.crossings([10, 20, 30, 40], [[1.0], [-1.0], [-1.0, -3.0], [2.0]]) == [15.0, 35.0]
    assert results.crossings([10, 20], [[1.0], [2.0]]) == []


def test_answers_are_compared_question_by_question() -> None:
    """Means over the seeds of both, an interval over questions; a run that was not asked stands without."""
    answers = {("a", 1): [1.0, 1.0, 0.0], ("b", 1): [1.0, 0.0, 0.0], ("a", 2): [1.0, 1.0, 1.0]}
    answers |= {("b", 2): [0.0, 1.0, 1.0]}
    found = [
        replace(run, answers={"stdlib": answers[run.name, run.seed]}) if run.seed < 3 else run
        for run in runs(a=[4.0, 5.0, 6.0], b=[4.1, 5.1, 6.1])
    ]
    assert results.answer_differences(found, "stdlib", "a", "b") == [0.5, 0.5, 0.0]
    assert results.answer_differences(found, "other", "a", "b") == []
    header, a, b = tables(report.table(comparison_of("a", "b"), found))[0]
    assert header[-2:] == ["stdlib (%)", "minus b [95%]"]
    assert (a[-2:], b[-2:]) == (["83.3", "+33.3 [-38.4, +105.0]"], ["50.0", ""])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_in_the_repository_plan(path: Path, tmp_path: Path) -> None:
    comparison = read(path, tmp_path)
    plan = Plan(comparison)
    stages = plan.stages()
    trained = [stage for stage in stages if stage.name.startswith("train-")]
    assert len(trained) == len(comparison.runs) * len(comparison.seeds)
    assert len({stage.name for stage in stages}) == len(stages)
    done: set[str] = set()
    for stage in stages:
        assert {earlier.name for earlier in stage.after} <= done, stage.name
        done.add(stage.name)
    for config in comparison.runs.values():  # as convert reads them
        method = read_method(config)
        method.init.check(RouterConfig(**method.router))
    # One data order: with one seed, training differs in its configuration and its checkpoint alone.
    for seed in comparison.seeds:
        for name in comparison.runs:
            as_it_is = comparison.starts.get(name) == {"dense": "8, half-way"}
            start = "--save" if name in comparison.from_scratch else "--load"
            start = "--pretrained-checkpoint" if as_it_is else start
            assert f"--seed {seed} {start}" in " ".join(plan.train(name, seed).command)


def test_an_existing_checkpoint_is_the_start(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_experts: 4\n")
    (tmp_path / "c.yaml").write_text(
        "checkpoint: dense\nkey_stats: keys\nseeds: [7]\nlauncher: srun launch.sh\n"
        "flags: {train_iters: 5, bf16: true}\nruns: {one: run.yaml}\n"
    )
    plan = Plan(read(tmp_path / "c.yaml", tmp_path / "out"))
    convert, train = (" ".join(stage.command) for stage in plan.stages())
    assert f"convert {tmp_path / 'dense'}" in convert and f"--key-stats {tmp_path / 'keys'}" in convert
    assert train.startswith("srun launch.sh -m megatron_router_upcycling.pretrain")
    assert "--train-iters 5 --bf16 --seed 7" in train


def test_entries_in_place_of_a_file_are_written_to_one(tmp_path: Path) -> None:
    """They build on files beside the comparison's, whatever folder it works in."""
    (tmp_path / "below.yaml").write_text("num_experts: 4\nlr: 1\nupcycling: {router: mlp}\n")
    one = "{base: below.yaml, lr: 2, upcycling: {target_entropy: 1.5}}"
    (tmp_path / "c.yaml").write_text(f"dense: {{lr: 3}}\nruns: {{'one, a': {one}, two: below.yaml}}\n")
    comparison = read(tmp_path / "c.yaml", tmp_path / "deep/out")
    file = tmp_path / "deep/out/configs/one-a.yaml"
    assert comparison.runs == {"one, a": file, "two": tmp_path / "below.yaml"} and comparison.dense
    upcycling = {"router": "mlp", "target_entropy": 1.5}
    assert read_yaml(file) == {"num_experts": 4, "lr": 2, "upcycling": upcycling}
    assert read_yaml(comparison.dense) == {"lr": 3, "upcycling": {}}
    train = Plan(comparison).train("one, a", 1234)
    assert str(file) in train.command and train.files == (file,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- x", "needs 'runs:'"),
        ("{", "cannot be read"),
        ("seed: [1]\ndense: d.yaml", "unknown entry 'seed'"),
        ("seeds: [1, 1]\ndense: d.yaml", "different whole numbers"),
        ("title: t", "either 'dense:'"),
        ("checkpoint: d", "needs 'key_stats:' beside it"),
        ("reference: b\ndense: d.yaml", "'b' is none of the runs"),
        ("dense: d.yaml\nruns: {a: missing.yaml}", "no such file"),
        ("claims: [{better: a}]\ndense: d.yaml", "claims"),
        ("tasks: nope\ndense: d.yaml", "'tasks:' is evaluate's --tasks nope: give names of"),
        ("flags: [a]\ndense: d.yaml", "'flags:' must be a mapping"),
        ("checkpoint: d\nkey_stats: k\ncorpus: {}", "'corpus:' is for a dense model"),
        ("corpus: {held_out: 0.1}\ndense: d.yaml", "'corpus:' needs 'train_tokenizer:'"),
        ("parts: {a: [re]}\ndense: d.yaml", "'parts:' needs 'branch_flags:' with train_iters"),
        ("branch_flags: 3\ndense: d.yaml", "'branch_flags:' must be a mapping"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text("num_experts: 4\n")
    (tmp_path / "c.yaml").write_text(text if "needs 'runs:'" in message else f"runs: {{a: r.yaml}}\n{text}")
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "c.yaml", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more", [["--bogus"], ["--jobs", "0"], ["--runs", "m=2,no"], ["--seeds", "1,9"], ["--output"]]
)
def test_mistakes_on_the_command_line(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("nowhere.yaml", str(FILES[0])):
        assert compare.main([file, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_some_runs_and_seeds_are_chosen() -> None:
    """Names may have commas in them."""
    ablations = read(ROOT / "configs/compare/ablations.yaml")
    chosen = ["m=16, n=16", "m=16", "router upcycling"]
    assert compare.choose_runs("m=16, n=16,m=16, router upcycling", ablations) == chosen
    assert compare.choose_runs(None, ablations) == list(ablations.runs)
    assert compare.choose_seeds("3,1", ablations) == [3, 1]


def test_quick_runs_are_short_whatever_the_file_says(tmp_path: Path) -> None:
    comparison = read(ROOT / "configs/compare/one_gpu.yaml", tmp_path)
    for quick, words in ((True, ("6", "256", "16")), (False, ("320", "512", "64"))):
        plan = Plan(comparison, quick)
        command, corpus = plan.train("calibrated", 1).command, plan.stages()[0].command
        given = dict(itertools.pairwise(command))
        assert (given["--train-iters"], given["--seq-length"], given["--global-batch-size"]) == words
        assert "--nproc-per-node" not in given and given["--lr"] == "0.0005"
        assert command.count("--train-iters") == 1 and ("--max-bytes" in corpus) == quick


def test_runs_side_by_side_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = [None, None, None]
    for number, ranks, seen in (
        *((0, 2, alike), (1, 1, alike), (2, 2, alike)),
        *((2, 1, ["5", "7", "5"]), (4, 2, ["5,7", "8,9", "5,7"])),
    ):
        monkeypatch.setattr(foundation, "gpus", lambda number=number: ["5", "7", "8", "9"][:number])
        assert [share.get("CUDA_VISIBLE_DEVICES") for share in foundation.shares(3, ranks)] == seen


def test_a_claim_that_was_added_after_looking_is_marked(tmp_path: Path) -> None:
    for experts, name in enumerate("abc", start=4):
        (tmp_path / f"{name}.yaml").write_text(f"num_experts: {experts}\n")
    file, output = tmp_path / "c.yaml", tmp_path / "out"

    def marks(*pairs: str) -> list[str]:
        said = ", ".join(f"{{better: {better}, than: {than}, source: s}}" for better, than in pairs)
        known = "checkpoint: d\nkey_stats: k\nruns: {a: a.yaml, b: b.yaml, c: c.yaml}\n"
        file.write_text(f"{known}claims: [{said}]\n")
        comparison = read(file, output)
        seen = claims.see(comparison)
        return [seen[claim].describe(claim) for claim in comparison.claims]

    def begin(name: str, config: str) -> None:
        (output / "stages").mkdir(exist_ok=True)
        record = {"command": f"pretrain --config {tmp_path / config}.yaml --seed 1", "finished": None}
        (output / f"stages/train-{name}-1.json").write_text(json.dumps(record))

    assert marks("ab") == [""]
    begin("a", "a")
    (one_side,) = marks("ac")
    assert "added when one side was known" in one_side and "1 run of a and no runs of c" in one_side
    begin("b", "b")
    assert marks("ab", "ac") == ["", one_side]  # what was there before stays as it was
    assert "added after looking" in marks("ba")[0]
    begin("an older name of c", "c")
    assert "added after looking" in marks("bc")[0]
    (tmp_path / "b.yaml").write_text("num_experts: 8\n")
    assert "added after looking" in marks("ab")[0]
    (output / "c/claims.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        marks("ab")


def test_a_run_is_read_from_what_it_wrote(tmp_path: Path) -> None:
    train, held_out = {"kind": "train"}, {"kind": "held_out"}
    for step, loss, kind in (
        *((1, 8.0, train), (2, 7.0, train), (2, 9.0, held_out | {"set": "test"})),
        *((2, 6.0, train), (2, 6.5, held_out | {"set": "validation"})),  # step 2 again, after a crash
    ):
        files.append(tmp_path / files.RUN, {"iteration": step, "tokens": 4096 * step, "lm_loss": loss} | kind)
    for loads in ([3.0, 2.0], [2.0, 1.0], [1.0, 1.5]):
        files.append(tmp_path / files.ROUTING, {"iteration": 1, "load_max_over_mean": loads})
    record = {"seconds": 60.0, "command": "command", "commit": "1234abc"}
    found = results.read_run("a", 1, tmp_path, record)
    assert (found.held_out, found.tokens, found.steps) == (6.5, 8192, 2)
    assert found.training == {4096: 8.0, 8192: 6.0}
    assert found.first_routing == {"load_max_over_mean": 2.5}
    assert found.routing == {"load_max_over_mean": 1.25}
    (tmp_path / files.RUN).write_text("")
    with pytest.raises(UserError, match="no finite held-out loss"):
        results.read_run("a", 1, tmp_path, record)


def test_report_names_every_run(tmp_path: Path) -> None:
    found = runs(a=[4.0, 5.0], b=[4.5, 5.25])
    found = [replace(run, training={4096: 5.0, 8192: 4.0 - (run.name == "a") / 8}) for run in found]
    failures, comparison = ["c, seed 1: no luck"], comparison_of("a", "b", "not begun")
    text = report.write(comparison, found, tmp_path / "out", "command", failures=failures, dense=4.75)
    assert "Failed:\n\n- c, seed 1: no luck" in text
    assert ["a", "4.5000 ± 0.7071", "-0.3750 [-1.9633, +1.2133]"] in [row[:3] for row in tables(text)[0]]
    assert "4 of 6 runs have ended" in text
    for name in ("loss_curves", "differences"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 10_000
    assert "- The dense model that was upcycled has a held-out loss of 4.75000, over" in text
    assert "a: never crosses it and ends 0.1250 below it" in text
    assert len(json.loads((tmp_path / "out/results.json").read_text())["runs"]) == 4


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path) -> None:
    """Two quick runs beside a third that fails go on after SIGKILL; one by one, they end the same."""
    file, output = tmp_path / "three.yaml", tmp_path / "out"
    methods = {name: f"{ROOT}/configs/methods/{name}.yaml" for name in ("locmoe", "mlp")}
    broken = {"base": methods["mlp"], "upcycling": {"target_entropy": 9}}
    given = {"dense": f"{ROOT}/configs/demo/dense.yaml", "seeds": [1], "ranks": 1, "tasks": "stdlib"}
    file.write_text(json.dumps(given | {"runs": {"broken": broken} | methods}))
    command = [warm.PYTHON, "-m", "tools.experiments.compare", str(file), "--output", str(output)]
    command += ["--quick", "--jobs", "2"]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    saved = [output / f"trained/{name}-1/latest_checkpointed_iteration.txt" for name in methods]
    deadline = time.monotonic() + 600
    while not any(path.exists() and path.read_text().strip() == "4" for path in saved):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    records = [json.loads((output / f"stages/train-{name}-1.json").read_text()) for name in methods]
    assert all(record["finished"] is None for record in records)

    def run_again() -> tuple[str, list[dict]]:
        deadline = time.monotonic() + 300
        while (again := subprocess.run(command, cwd=ROOT, capture_output=True, text=True)).returncode != 1:
            # Ranks that outlived their parent hold the folder's lock until they end.
            assert "another run is at work there" in again.stderr and time.monotonic() < deadline, again
            time.sleep(1)
        read = json.loads((output / "three/results.json").read_text())
        (failure,) = read["failures"]
        assert failure.startswith(
            "broken, seed 1: convert-broken-1: its command ended with status 2 (error: "
        )
        text = (output / "three/report.md").read_text()
        assert "- broken, seed 1: " in text and f"a held-out loss of {read['dense']:.5f}, over" in text
        return again.stdout, [run | {"seconds": 0.0} for run in read["runs"]]

    said, found = run_again()
    assert said.count("done before") == 5  # the corpus, the dense model, its keys, two conversions
    logs = [(output / f"logs/train-{name}-1.log").read_text() for name in methods]
    assert any(log.count("iteration        4/") == 1 for log in logs)  # it went on from there
    assert [run["name"] for run in found] == list(methods)
    assert all(run["held_out"] > 0 and run["routing"]["load_max_over_mean"] >= 1 for run in found)
    assert all(len(run["answers"]["stdlib"]) == QUICK_QUESTIONS for run in found)

    shutil.rmtree(output / "trained")
    file.write_text(file.read_text().replace("stdlib", ""))
    command[-1] = "1"
    assert run_again()[1] == [run | {"answers": {}} for run in found]


REPORTS = sorted((ROOT / "docs/comparison").glob("*/report.md"))


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a page in Markdown, its header first."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
        for lines in blocks
    ]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell)]


@pytest.mark.parametrize("page", REPORTS, ids=lambda path: path.parent.name)
def test_reports_in_the_documents_follow_from_the_losses_in_them(page: Path, tmp_path: Path) -> None:
    """Means, intervals and verdicts, computed again from the losses of every seed; claims as they stand."""
    comparison, text = read(ROOT / f"configs/compare/{page.parent.name}.yaml", tmp_path), page.read_text()
    found, claimed, (seeds, *losses) = tables(text)
    results = [
        RunResult(name, int(seed.removeprefix("seed ")), float(loss), {}, 0, 0, {}, {}, 0.0, "", "")
        for name, *row in losses
        for seed, loss in zip(seeds[1:], row, strict=True)
        if loss
    ]
    assert [row[0] for row in found[1:]] == [name for name, *_ in losses]
    for name, loss, apart, *_ in found[1:]:
        spread = report.spread([run.held_out for run in results if run.name == name])
        assert numbers(loss)[:2] == pytest.approx(numbers(spread), abs=1.5e-4)
        if name != comparison.reference:
            again = str(interval(differences(results, name, comparison.reference)))
            assert numbers(apart) == pytest.approx(numbers(again), abs=2e-4)
    assert claimed[0] == list(report.VERDICTS)
    judged = sum(len(differences(results, *claim.runs)) > 1 for claim in comparison.claims)
    for claim, row in zip(comparison.claims, claimed[1:], strict=True):
        title, source, word, apart, *rest = report.verdict(claim, results, judged)
        assert row[:2] == [title, source] and row[2].startswith(word) and row[4:] == rest
        assert numbers(row[3]) == pytest.approx(numbers(apart), abs=2e-4)
    assert re.search(r"^Made by `python -m tools\.experiments\.compare .*, commits? [0-9a-f]{12}", text, re.M)
