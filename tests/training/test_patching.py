"""Wrapping upstream symbols: once, with the original kept, and with one error where something has gone."""

import importlib
import sys
import types
from collections.abc import Callable

import pytest

from megatron_router_upcycling.training.patches import patching


def upstream(value: int, scale: int = 1) -> int:
    return value * scale


def plus_one(original: Callable[..., int], *args: int, **kwargs: int) -> int:
    return original(*args, **kwargs) + 1


def test_a_second_wrap_changes_nothing_and_the_original_stays() -> None:
    module = types.SimpleNamespace(function=upstream)
    for _ in range(2):
        patching.wrap("here", module, "function", plus_one, reads=("value", "scale"))
    assert module.function(3, scale=2) == 7
    assert module.function.__wrapped__ is upstream and module.function.__name__ == "upstream"
    patching.wrap("elsewhere", module, "function", plus_one)
    assert module.function(3) == 5


def test_what_has_gone_is_named_with_what_to_do() -> None:
    module = types.ModuleType("upstream.module")
    module.function = upstream  # type: ignore[attr-defined]
    for name, reads, missing in (
        ("gone", (), "gone"),
        ("function", ("value", "offset"), r"function\(offset\)"),
    ):
        message = rf"^here: upstream\.module\.{missing} does not exist .* with megatron-core 0\.19; install"
        with pytest.raises(RuntimeError, match=message):
            patching.wrap("here", module, name, plus_one, reads)
    with pytest.raises(RuntimeError, match=r"here: upstream\.module\.gone does not exist"):
        patching.replace("here", module, "gone", upstream)
    assert module.function is upstream and not hasattr(module, "gone")  # type: ignore[attr-defined]


def test_a_method_that_a_megatron_class_only_inherits_counts_as_gone() -> None:
    """Its base class's does something else. Of PyTorch's classes the inherited ones are meant."""

    class Base:
        def step(self) -> None: ...

    class Derived(Base):
        pass

    Derived.__module__ = "torch.optim"
    assert patching.find("here", Derived, "step") is Base.step
    Derived.__module__ = "megatron.core.optimizer"
    with pytest.raises(RuntimeError, match=r"here: Derived\.step does not exist"):
        patching.find("here", Derived, "step")


def test_a_package_is_left_out_meanwhile_only() -> None:
    absent = pytest.raises(ModuleNotFoundError, match="antigravity")
    with patching.without(antigravity=True, sys=True, colorsys=False), absent:
        assert importlib.import_module("colorsys") and importlib.import_module("antigravity")
    assert "antigravity" not in sys.modules and sys.modules["sys"] is sys
