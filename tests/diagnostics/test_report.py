"""The report over a real run: what it says, that it holds all it needs, and a real browser's opinion."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.diagnostics import report
from megatron_router_upcycling.diagnostics.plots import RunData
from megatron_router_upcycling.training.run_log import files

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
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


def _console(browser: str, page: Path, profile: Path) -> list[str]:
    """What a headless browser says of ``page``, and that it drew it."""
    shot = profile / "shot.png"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.stat().st_size > 1000, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_page_opens_in_a_browser_without_a_complaint(page: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    broken = tmp_path / "broken.html"
    broken.write_text("<script>nowhere()</script>")
    assert _console(browser, broken, tmp_path / "profile")  # complaints would be seen
    assert _console(browser, page, tmp_path / "profile") == []


def test_a_folder_that_is_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    complaint = f"error: {tmp_path}: no run.jsonl there; name a folder that pretrain saves to\n"
    assert capsys.readouterr().err == complaint
    files.append(tmp_path / files.RUN, {"iteration": 1, "kind": "train", "lm_loss": None})
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no loss in it yet" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [Path("/a/seed1/mixture"), Path("/a/seed2/mixture"), Path("/a/seed1/linear")]
    assert report._names(folders) == ["seed1/mixture", "seed2/mixture", "seed1/linear"]
    assert report._names(folders[1:]) == ["mixture", "linear"]


def test_options_say_what_a_start_changes_and_nothing_of_other_routers() -> None:
    linear = {"router": {"router": "linear", "pooling": "sum"}, "init": {"gate": "centroid", "keys": "heads"}}
    said = report.conversion([RunData("run", [], [], linear), RunData("other", [], [])])
    assert said == {"router": ["linear", "–"], "gate": ["centroid", "–"]}
