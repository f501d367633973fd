"""The examples run, and print what they promise."""

import math
import re
from pathlib import Path

from tests import launch
from tests.repository import ROOT


def test_equations() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"equations", "upcycle"}
    text = launch.python(ROOT / "examples" / "equations.py").ok().text
    for number in range(4, 9):
        assert f"\neq. {number}, " in text
    assert "sets of heads: [[0, 2], [1, 3]]" in text
    # K_0 is the average keys of heads 0 and 2, one behind the other.
    keys = re.search(r"eq\. 4,.*\n *\[\[(.*)\],", text)
    assert keys and [float(value) for value in keys[1].split(",")] == [2.0, 0.1, 1.0, 0.0]
    weights = [float(value) for value in re.findall(r"expert \d with weight (\S+)", text)]
    assert len(weights) == 3 and all(0.5 <= weight <= 1 for weight in weights)


def test_upcycle(tmp_path: Path) -> None:
    text = launch.python(ROOT / "examples" / "upcycle.py", "--output", tmp_path / "out").ok().text
    assert "WRONG" not in text and "routers equal" in text
    assert "Mixture-of-Experts, 8 experts" in text
    shares = [float(share) for share in re.findall(r"expert \d x (\S+?),?\s", text + "\n")]
    assert len(shares) == 8 and all(math.isfinite(share) and 0 < share < 1 for share in shares)
    # Given a folder, it takes that model, and replaces what an earlier run has made.
    given = ("--model", tmp_path / "out" / "hf", "--output", tmp_path / "out")
    assert "WRONG" not in launch.python(ROOT / "examples" / "upcycle.py", *given).ok().text
