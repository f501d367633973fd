"""Megatron's names: both kinds of them, and that no other file of the package spells one."""

import ast
import re
from pathlib import Path

import megatron_router_upcycling
from megatron_router_upcycling.checkpoint import names

PACKAGE = Path(megatron_router_upcycling.__file__).parent
# What only a name of Megatron's tensors has in it.
SPELLED = re.compile(
    r"decoder\\?\.(layers|final_layernorm)|\._extra_state|word_embeddings\.|position_embeddings\."
    r"|output_layer\.weight|pre_mlp_layernorm|input_layernorm\.$|mlp\\?\.(linear_fc|router\b|shared_experts|experts\b)"
    r"|self_attention\\?\.(linear|core|[qk]_)|linear_qkv"
)
# Hugging Face has names that look alike.
OTHERS = tuple(PACKAGE / name for name in ("checkpoint/names.py", "hf/name_table.py", "hf/model_card.py"))


def strings(source: str) -> list[tuple[int, str]]:
    """Line and text of every string literal, also within an f-string, that is no docstring."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
    ]


def test_only_one_file_spells_a_name() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in OTHERS
        for line, text in strings(path.read_text())
        if SPELLED.search(text)
    ]
    assert not found, "\n".join(found)


def test_the_search_knows_every_name() -> None:
    found = [value for value in vars(names).values() if str(value).startswith("decoder.")]
    assert len(found) > 10 and all(SPELLED.search(name) for name in found)


def test_norms_go_by_two_names() -> None:
    assert names.other_norm("decoder.layers.3.pre_mlp_layernorm.bias") == (
        "decoder.layers.3.mlp.linear_fc1.layer_norm_bias"
    )
    for one, other in names.NORMS[1:]:
        assert names.other_norm(one) == other and names.other_norm(other) == one
    state = names.extra_state("decoder.layers.pre_mlp_layernorm", (0, 4))
    assert names.other_norm(state) is None and names.other_norm(names.QKV) is None


def test_extra_states_of_both_kinds() -> None:
    stacked = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.5_4.8"
    assert names.extra_state(f"{names.EXPERTS}.linear_fc1", (2, 4), (5, 8)) == stacked
    own, of_stack = "decoder.layers.2.x._extra_state/shard_0_1", "decoder.layers.x._extra_state/shard_2_4"
    assert names.stacked_state(own, 4) == of_stack and names.own_state(of_stack) == own
    assert names.stacked_state(names.QKV, 4) is None and names.own_state(names.QKV) is None
    every = names.extra_states(4, 8, qk_layernorm=True)
    assert stacked in every and len(every) == len(set(every)) == 1 + 4 * (6 + 2 * 8)
    some = names.extra_states(4, 8, qk_layernorm=True, shared_expert=True, layers=(1,))
    assert len(some) == len(set(some)) == 1 + 4 * 6 + 3 * 2 + 2 * (8 + 1)
    dense = names.extra_states(4, 0, qk_layernorm=False)
    assert len(dense) == len(set(dense)) == 1 + 4 * 5
