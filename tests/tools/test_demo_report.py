"""tools/experiments/demo_report.py: what is read from Megatron's logs, and the numbers made of it."""

import json
import os

import pytest

from tools.experiments import demo_report
from tools.experiments.demo_report import Curve, ModelResult

# Lines as megatron-core 0.19.2 prints them.
LOG = """\
 [2026-11-22 02:44:39.208160] iteration        1/      40 | consumed samples:           16 | elapsed time \
per iteration (ms): 1412.6 | learning rate: 1.500000E-03 | global batch size:    16 | lm loss: 8.357167E+00 \
| load_balancing_loss: 1.021E+00 | loss scale: 1.0 | grad norm: 2.189 |
------------------------------------------------
 [2026-11-22 02:45:15.754359] iteration       30/      40 | consumed samples:          480 | elapsed time \
per iteration (ms): 944.9 | learning rate: 3.000000E-03 | global batch size:    16 | lm loss: 5.875924E+00 |
 [2026-11-22 02:47:15.754359] iteration       30/      40 | consumed samples:          480 | elapsed time \
per iteration (ms): 944.9 | learning rate: 3.000000E-03 | global batch size:    16 | lm loss: 5.875000E+00 |
 validation loss at iteration 40 on validation set | lm loss value: 5.618283E+00 | lm loss PPL: 2.75E+02 |
"""


def test_losses_are_read_from_the_log_and_a_resumed_iteration_counts_once():
    curve = demo_report.parse_log(LOG)
    assert curve.training == {1: 8.357167, 30: 5.875}
    assert (curve.held_out, curve.last) == (5.618283, 40)


def test_two_ranks_may_print_on_one_line():
    line = LOG.splitlines()[0]
    curve = demo_report.parse_log(
        f"memory (MB) | allocated: 0.00{line} validation loss at iteration 1 |{LOG}"
    )
    assert curve.training[1] == 8.357167
    assert demo_report.parse_log(line + line.replace(" 1/", " 2/")).training == {1: 8.357167, 2: 8.357167}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param([[5, 5, 5, 5]], 1.0, id="even"),
        pytest.param([[20, 0, 0, 0]], 4.0, id="collapsed"),
        pytest.param([[10, 5, 5, 0], [20, 0, 0, 0]], 3.0, id="mean of 2 and 4"),
    ],
)
def test_imbalance_is_the_busiest_expert_over_the_mean(tokens, expected):
    assert demo_report.imbalance(tokens) == expected


def test_disk_use_does_not_count_what_is_linked(tmp_path):
    source, made = tmp_path / "dense", tmp_path / "moe"
    (source / "iter").mkdir(parents=True)
    (made / "release").mkdir(parents=True)
    (source / "iter" / "a").write_bytes(b"x" * 1000)
    os.link(source / "iter" / "a", made / "release" / "a")
    (made / "release" / "b").write_bytes(b"y" * 30)
    assert demo_report.disk_use(made, source) == (30, 1030)


@pytest.fixture
def findings() -> tuple[Curve, dict[str, Curve], list[ModelResult]]:
    dense = Curve({10: 6.0, 20: 5.0}, 4.95, 20)
    continued = {
        "router upcycling": Curve({10: 4.9, 20: 4.7}, 4.6789, 25),
        "vanilla upcycling": Curve({10: 4.95, 20: 4.75}, 4.7, 25),
    }
    results = [
        ModelResult("dense", None, 4.95, None, None, None, None, None),
        ModelResult("router upcycling", 5.5, 4.6789, 1.5, 1.25, 3.21, 2_500_000, 31_000_000),
        ModelResult("vanilla upcycling", 5.6, 4.7, 1.75, 1.5, 3.0, 0, 29_000_000),
    ]
    return dense, continued, results


def test_table_has_a_row_for_each_model(findings):
    lines = demo_report.table(findings[2]).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["dense", "–", "4.9500", "–", "–", "–", "–"]
    assert cells[3] == ["router upcycling", "5.5000", "4.6789", "1.50", "1.25", "3.2 s", "2.50 of 31.00 MB"]
    assert cells[4][-1] == "0.00 of 29.00 MB"


def test_picture_shows_every_run_where_it_belongs(findings, tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    demo_report.picture(*findings, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    axes = pyplot.gcf().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", *findings[1]]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(list(p.get_xdata()), list(p.get_ydata())) for p in points] == [
        ([20], [4.95]),
        ([20, 45], [5.5, 4.6789]),
        ([20, 45], [5.6, 4.7]),
    ]
    lines = [line for line in axes.lines if line.get_label() in ("dense", *findings[1])]
    assert [(list(p.get_xdata()), list(p.get_ydata())) for p in lines] == [
        ([10, 20], [6.0, 5.0]),
        ([30, 40], [4.9, 4.7]),
        ([30, 40], [4.95, 4.75]),
    ]
    monkeypatch.undo()
    pyplot.close("all")


def test_results_survive_json(findings):
    found = json.loads(json.dumps(demo_report.as_json(*findings)))
    assert found["models"][1]["loss_at_end"] == 4.6789
    assert found["curves"]["router upcycling"]["training"]["20"] == 4.7
