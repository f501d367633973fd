"""The Triton kernels: against their plain forms in Triton's interpreter, and through its compiler."""

import re
import sys
from pathlib import Path

import pytest

from megatron_router_upcycling.layers import kernels
from tests import launch
from tests.layers.kernel_checks import CANNOT, CHECKS


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each check said. In a process of its own: Triton reads the environment when it is imported."""
    if not kernels.INSTALLED:
        pytest.skip("Triton is not installed, so there is no interpreter for its kernels")
    if CANNOT:
        pytest.skip(CANNOT)
    done = launch.run(sys.executable, "-m", "tests.layers.kernel_checks", TRITON_INTERPRET="1").ok()
    return dict(re.findall(r"^(\w+): (.*)$", done.text, re.M))


@pytest.mark.parametrize("check", CHECKS)
def test_kernel_equals_its_plain_form(said: dict[str, str], check: str) -> None:
    assert said[check] == "ok"


@pytest.mark.skipif(not kernels.INSTALLED, reason="Triton is not installed")
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = launch.run(sys.executable, "-m", "tests.layers.compiled_kernels", **environment).ok()
    shared = dict(re.findall(r"^(\w+): (\d+)$", done.text, re.M))
    sources = [path.read_text() for path in Path(kernels.__file__).parent.glob("*.py")]
    launched = {name for text in sources for name in re.findall(r"(\w+)\[[^\]\n]+\]\(", text)}
    assert len(launched) > 15 and launched == shared.keys()
    assert max(map(int, shared.values())) <= 227 * 1024


def test_every_file_of_kernels_is_checked() -> None:
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")} - {"__init__"}
    assert files and files <= CHECKS.keys()
