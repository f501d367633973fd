"""The report over a real run: what it says, and that it holds all it needs."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.diagnostics import plots, report
from megatron_router_upcycling.diagnostics.plots import RunData
from megatron_router_upcycling.training.run_log import files

SECTIONS = ("loss", "load", "load_map_1", "load_map_2", "routing", "specialisation")


@pytest.fixture(scope="module")
def page(unbroken: tuple[Path, dict[int, float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report over a run of eight steps and a part of it, as if it were still training."""
    folder = tmp_path_factory.mktemp("reports")
    part = folder / "<part> & more"
    part.mkdir()
    for name in (files.RUN, files.ROUTING):
        shutil.copy(unbroken[0] / name, part)
        files.keep_until(part / name, 5)
    assert cli.main(["report", str(unbroken[0]), str(part), "--output", str(folder / "out")]) == 0
    return folder / "out" / "report.html"


def test_page_says_what_the_files_hold(page: Path, unbroken: tuple[Path, dict[int, float]]) -> None:
    text = page.read_text(encoding="utf-8")
    losses = files.read(unbroken[0] / files.RUN)
    routing = files.read(unbroken[0] / files.ROUTING)
    assert f"{losses[-1]['lm_loss']:.4f}" in text  # held out
    assert f"{losses[-1]['tokens']:,}" in text
    ends = [f"{sum(routing[at]['load_max_over_mean']) / 4:.2f}" for at in (0, -1)]
    assert " → ".join(ends) in text
    (panel, *_) = plots._grid([(0, report.read_runs([unbroken[0]])[0])], plots.ROUTING).axes
    assert list(panel.lines[0].get_ydata()) == pytest.approx([sum(line["entropy"]) / 4 for line in routing])
    assert "mixture of 8, sum; 2 of 8; top-k first" in text
    assert "&lt;part&gt; &amp; more" in text and "<part>" not in text
    assert text.count("<img ") == len(SECTIONS)
    for name in SECTIONS:
        png = (page.parent / f"{name}.png").read_bytes()
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        assert png.startswith(b"\x89PNG") and width > 1000 and height > 250, name


def test_page_needs_nothing_else(page: Path) -> None:
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link(?! rel=\"icon\" href=\"data:)", text.lower())
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,22})|url\(", text)
    assert len(sources) == 1 + len(SECTIONS) and all(source.startswith("data:") for source in sources)


def test_a_folder_that_is_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    complaint = f"error: {tmp_path}: no run.jsonl there; name a folder that pretrain saves to\n"
    assert capsys.readouterr().err == complaint
    files.append(tmp_path / files.RUN, {"iteration": 1, "kind": "train", "lm_loss": None})
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no loss in it yet" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("seed1/mixture", "seed2/mixture", "seed1/linear")]
    for folder, loss in zip(folders, (3.0, 1.0, 2.0), strict=True):
        folder.mkdir(parents=True)
        files.append(folder / files.RUN, {"iteration": 1, "kind": "held_out", "tokens": 1, "lm_loss": loss})
    rows = [(row["name"], row["best"]) for row in report.summary(report.read_runs(folders))]
    assert rows == [("seed1/mixture", False), ("seed2/mixture", True), ("seed1/linear", False)]
    assert [run.name for run in report.read_runs(folders[::2])] == ["mixture", "linear"]


def test_options_say_what_differs_from_the_defaults() -> None:
    linear = {"router": {"router": "linear", "pooling": "sum"}, "init": {"gate": "centroid", "keys": "heads"}}
    usual = {"router": {"router": "mixture", "pooling": "sum"}, "seed": 3}
    said = report.conversion([RunData("run", [], [], linear), RunData("other", [], [], usual)])
    assert said == {"router": ["linear", "mixture"], "gate": ["centroid", "–"], "seed": ["–", "3"]}
