"""stages.py with real commands: what runs, what is skipped, what resumes after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_router_upcycling.errors import UserError
from tests import launch
from tools.experiments.stages import Pipeline, Stage


def stage(folder: Path, name: str, code: str, **options) -> Stage:
    """A stage whose command is a few lines of Python, with ``out`` bound to its output path."""
    output = folder / name
    program = f"import pathlib, sys; out = pathlib.Path({str(output)!r})\n{code}"
    return Stage(name, name, (sys.executable, "-c", program), output, **options)


def append(text: str) -> str:
    """Code that appends, so that a second run shows in the output."""
    return f"with out.open('a') as f: f.write({text!r})"


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    return Pipeline(tmp_path, dict(os.environ))


def test_a_stage_runs_again_only_after_a_change_to_it_or_before_it(pipeline, tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text("a: 1\n")
    copy = f"out.write_text(pathlib.Path({str(config)!r}).read_text())"

    def stages() -> list[Stage]:
        first = stage(tmp_path, "first", copy, files=(config,))
        other = stage(tmp_path, "other", append("o"))
        after = stage(tmp_path, "after", "out.write_text((out.parent / 'first').read_text())", after=(first,))
        return [first, other, after]

    pipeline.run(stages())
    pipeline.run(stages())
    assert capfd.readouterr().out.count("done before") == 3
    config.write_text("a: 2\n")
    pipeline.run(stages())
    assert (tmp_path / "after").read_text() == "a: 2\n"
    assert (tmp_path / "other").read_text() == "o"
    # So does an output that has gone.
    before = (tmp_path / "after").stat().st_mtime_ns
    (tmp_path / "first").unlink()
    pipeline.run(stages())
    assert (tmp_path / "after").stat().st_mtime_ns > before


def test_output_of_a_failed_stage_is_removed_unless_it_resumes(pipeline, tmp_path):
    code = "text = out.read_text() if out.exists() else ''; out.write_text(text + 'x'); sys.exit(text == '')"
    for name, resumes, expected in (("resuming", True, "xx"), ("plain", False, "x")):
        trying = stage(tmp_path, name, code, resumes=resumes)
        for _ in range(2):
            try:
                pipeline.run([trying])
            except UserError:
                continue
        assert (tmp_path / name).read_text() == expected, name
        assert pipeline.is_done(trying) == resumes
    # One that resumes starts anew when its command changed.
    with pytest.raises(UserError):
        pipeline.run([stage(tmp_path, "run", append("old") + "\nsys.exit(1)", resumes=True)])
    pipeline.run([stage(tmp_path, "run", append("new"), resumes=True)])
    assert (tmp_path / "run").read_text() == "new"


def test_stopping_ends_the_command_and_only_one_run_works_in_a_folder(pipeline, tmp_path):
    """SIGTERM ends the child too; meanwhile a second run is refused."""
    pid = tmp_path / "pid"
    slow = f"import os, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    driver = f"""
import os, pathlib, sys
from tools.experiments.stages import Pipeline, Stage, command_line
folder = pathlib.Path({str(tmp_path)!r})
slow = Stage("slow", "slow", (sys.executable, "-c", {"import pathlib;" + slow!r}), folder / "slow")
sys.exit(command_line(lambda: Pipeline(folder, dict(os.environ)).run([slow])))
"""
    command = [sys.executable, "-c", driver]
    process = subprocess.Popen(command, cwd=launch.ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid.read_text())
    with pytest.raises(UserError, match="another run"):
        pipeline.run([])
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "stopped; run the same command again to resume\n"
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    pipeline.run([])


def test_stages_side_by_side_see_each_other(pipeline, tmp_path, capfd):
    """Each waits for the other's file, so that both end only if they run at the same time; a third, which
    comes after both, sees both outputs."""
    wait = "import time\nwhile not (out.parent / {!r}).exists(): time.sleep(0.02)\nout.write_text('x')"
    pair = [
        stage(tmp_path, name, f"(out.parent / 'here {name}').touch()\n" + wait.format(f"here {other}"))
        for name, other in (("one", "two"), ("two", "one"))
    ]
    last = "import os\nassert (out.parent / 'one').exists() and (out.parent / 'two').exists()\n"
    last += "out.write_text(os.environ['SHARE'])"
    stages = [*pair, stage(tmp_path, "three", last, after=tuple(pair))]
    pipeline.run(stages, shares=[{"SHARE": "a"}, {"SHARE": "b"}])
    assert (tmp_path / "three").read_text() == "a"
    labels = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    assert labels[:2] == ["[1/3] one", "[2/3] two"] and labels[4] == "[3/3] three"
    assert len(labels) == 6 and labels[5].startswith("[3/3] three: ")


def test_a_failed_stage_ends_no_other_where_asked(pipeline, tmp_path, capfd):
    code = "out.write_text('half'); print('noise'); print('error: no luck'); sys.exit(3)"
    bad = stage(tmp_path, "bad", code)
    never = stage(tmp_path, "never", append("n"), after=(bad,))
    good = stage(tmp_path, "good", append("g"))
    why = f"its command ended with status 3 (error: no luck); the whole log is {pipeline.log(bad)}"
    for jobs in (1, 2):
        pipeline.run([bad, never, good], shares=[{}] * jobs, keep_going=True)
        assert pipeline.failure(bad) == why and not pipeline.is_done(bad)
    assert (tmp_path / "good").read_text() == "g" and not (tmp_path / "never").exists()
    assert pipeline.failure(good) is None and pipeline.failure(never) is None
    assert "failed: bad: the command ended with status 3" in capfd.readouterr().err
    # Where it is asked to stop instead, what runs beside it is ended too.
    slow = stage(tmp_path, "slow", "import time; out.touch(); time.sleep(60); out.unlink()")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"bad: .*status 3.*bad\.log"):
        pipeline.run([slow, bad, never], shares=[{}, {}])
    assert time.monotonic() - began < 30 and not pipeline.is_done(slow) and not (tmp_path / "never").exists()
    assert capfd.readouterr().err == "error: no luck\n"


def test_progress_is_that_of_the_last_line_of_megatron(pipeline, tmp_path, capfd):
    line = " [2026-11-22 02:44:47] iteration {:>8}/      40 | time (ms): 945.5 | lm loss: {}E+00 |"
    said = "\n".join(("nothing yet", line.format(9, "8.525500"), line.format(10, "7.525500")))
    pipeline.run([stage(tmp_path, "training", f"print({said!r}); out.touch()")])
    assert "[1/1] training: 10 iterations, loss 7.526, " in capfd.readouterr().out
