"""``--moe-layer-freq``: a text means what Megatron's own evaluation makes of it, or is refused at once."""

import contextlib
import time
from argparse import ArgumentParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling import expert_layers
from megatron_router_upcycling.config import flags
from megatron_router_upcycling.errors import UserError

LISTS = st.recursive(
    st.lists(st.sampled_from("01"), max_size=4).map(lambda items: f"[{','.join(items)}]"),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("+".join),
        st.tuples(inner, st.sampled_from("0123")).map(lambda pair: f"({pair[0]})*{pair[1]}"),
        st.tuples(st.sampled_from("0123"), inner).map(lambda pair: f"{pair[0]}*({pair[1]})"),
        inner.map(lambda one: f"({one})"),
    ),
    max_leaves=6,
)


@given(LISTS, st.text("01239[]()+*, ", max_size=12))
def test_what_is_accepted_is_what_python_makes_of_it(text: str, other: str) -> None:
    assert expert_layers.layer_frequency(text) == eval(text)
    with contextlib.suppress(UserError):
        assert expert_layers.layer_frequency(other) == eval(other.strip())


def test_megatrons_parser_evaluates_nothing() -> None:
    """Whether the text stands on the command line, in a YAML file or in a checkpoint's manifest."""
    from megatron.training.arguments import add_megatron_arguments, moe_freq_type

    for text in ("3", "[0,1,1]", "[0]+[1]*23", "([0]+[1]*3)*6", "([1]*3+[0]*2)*2", "[1,]"):
        assert expert_layers.layer_frequency(text) == moe_freq_type(text)
    parser = flags.add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    assert parser.parse_args(["--moe-layer-freq", "[0]+[1]*3"]).moe_layer_freq == [0, 1, 1, 1]
    with pytest.raises(UserError, match="--moe-layer-freq .*must be a number"):
        parser.parse_args(["--moe-layer-freq", "9**9**9"])
    with pytest.raises(UserError, match="must be a number"):
        flags.set_defaults(parser, {"moe_layer_freq": "[0]*10**12"}, "x.yaml")


LARGE = ["[0]*10**12", "9**9**9", "[1]*9999*9999", "99999*99999*99999*[]", "[1]*" + "9" * 1_000_000]
LARGE += ["(" * 100_000, "(" * 5_000 + "[1]" + ")" * 5_000, "[" + "1," * 10_000_000 + "1]"]
LARGE += ["+".join(["[1]*9999"] * 10_000), "+".join(["[1]*9999"] * 500)]
WRONG: list[Any] = ["__import__('os').system('true')", "[0x1]", "[1 0]", "[[1]]", "[2]", "(1,0)*2"]
WRONG += ["[1]-[0]", "[1", "", "0", 0, True, None, 1.5, [0, 2], [True], {"a": 1}]


@pytest.mark.parametrize("text", [*LARGE, *WRONG], ids=lambda text: str(text)[:20])
def test_a_hostile_or_wrong_value_is_one_line_at_once(text: object) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="--moe-layer-freq .*must be a number, or a list") as refused:
        expert_layers.layer_frequency(text)
    assert time.monotonic() - start < 5 and len(str(refused.value)) < 1100


def test_numbers_and_lists_say_which_layers() -> None:
    assert expert_layers.has_experts(2, 5) == [True, False, True, False, True]
    assert expert_layers.has_experts([1, 0, 0, 1], 4) == [True, False, False, True]
