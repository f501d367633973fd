"""plan.py: runs that begin from branches of the dense model, or from the trained model of an earlier run."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_router_upcycling.errors import UserError
from tools.experiments import claims
from tools.experiments.comparison import Claim, read
from tools.experiments.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_begins_from_branches_of_the_dense_model(tmp_path: Path) -> None:
    plan = Plan(read(ROOT / "configs/compare/domains.yaml", tmp_path))
    base, parts = plan.foundation, list(plan.comparison.parts)
    assert base is not None
    domain, copies = (" ".join(plan.convert(name, 1).command) for name in ("domain", "copies, heads"))
    experts, keys = (f"{tmp_path}/dense_{{}}", f"{tmp_path}/key_stats_over_{{}}.safetensors")
    assert f"convert {tmp_path}/dense " in domain and " --average-rest --seed 1 " in domain
    for flag, form in (("--experts", experts), ("--key-stats", keys)):
        assert " ".join([flag, *map(form.format, parts)]) in domain
    assert f"convert {tmp_path}/dense_all " in copies and f"{tmp_path}/key_stats_all.safetensors" in copies
    one, every = (" ".join(base.branch(name).command) for name in ("windows", "all"))
    assert f"--train-data-path 1 {tmp_path}/corpus_windows/text --valid" in one and "--train-iters 60 " in one
    assert every.count("/text_held_out") == len(parts) and f"--train-iters {60 * len(parts)} " in every


def test_a_run_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    plan = Plan(read(ROOT / "configs/compare/more_experts.yaml", tmp_path))
    convert, train = plan.convert("8 to 16", 2), " ".join(plan.train("8 to 16", 2).command)
    assert convert.after == (plan.train("8, half-way", 2),) and "--config" not in convert.command
    assert f"convert {tmp_path}/trained/8-half-way-2 " in " ".join(convert.command)
    # After the 80 steps of that run, on the data after those; a claim of it is also one about that run.
    assert "--train-iters 160 --iterations-to-skip 1 2 " in train and train.endswith(" 79 80")
    claim, digests = Claim("8 to 16", "8", "s"), set()
    for changes in ({}, {"num_experts": 32}):
        starts = plan.comparison.starts | {"8 to 16": plan.comparison.starts["8 to 16"] | changes}
        digests.add(claims._digest(claim, replace(plan.comparison, starts=starts)))
    other = plan.comparison.runs | {"8, half-way": plan.comparison.runs["8"]}
    digests.add(claims._digest(claim, replace(plan.comparison, runs=other)))
    assert len(digests) == 3
    # Of two runs with one file but other starts, one is not taken for the other.
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train-8-anew-2.json").write_text(
        f"--config {plan.comparison.runs['8, anew']} --load x"
    )
    assert [claims._begun(plan.comparison, name) for name in ("8, anew", "8 to 16")] == [1, 0]
    (tmp_path / "c.yaml").write_text("dense: d.yaml\nruns: {a: {convert: {dense: a}}}\n")
    with pytest.raises(UserError, match="'convert:' dense 'a' of run 'a' is none of"):
        read(tmp_path / "c.yaml", tmp_path)
