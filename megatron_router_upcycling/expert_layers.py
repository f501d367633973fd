"""Which layers have experts, as Megatron's ``--moe-layer-freq`` says it.

A number N gives every Nth layer experts, from the first one on. A list has a 0 or 1 for each layer and may be
written as sums and multiples, as in ``[0]+[1]*23`` or ``([0]+[1]*3)*6``. Megatron evaluates such a text as
Python, which a text such as ``[0]*10**12`` never leaves. Here it is parsed, within bounds.

Pure: imports neither torch nor Megatron.
"""

import ast
import re
from collections.abc import Collection
from typing import Any

from megatron_router_upcycling.errors import UserError

MOST_LAYERS = 10_000
LONGEST_TEXT = 20_000  # characters
DEEPEST = 200  # sums and brackets within others
TEXT = re.compile(r"[\d\[\]()+*,\s]+")

type Frequency = int | list[int]


def layer_frequency(value: Any, source: str = "--moe-layer-freq") -> Frequency:
    """``value`` (a text, a number or a list) as Megatron means it.

    Args:
        source: what errors name before the value.

    Raises:
        UserError: neither a number of at least 1 nor a list of 0 and 1.
    """
    found = value
    if isinstance(value, str):
        try:
            found = _read(value)
        except ValueError:
            found = None
    listed = isinstance(found, list) and all(type(one) is int and one in (0, 1) for one in found)
    if not listed and not (type(found) is int and found >= 1):
        raise UserError(
            f"{source} {value}: must be a number, or a list with a 0 or 1 for each layer, as in ([0]+[1]*3)*2"
        )
    return found


def has_experts(frequency: Frequency, num_layers: int) -> list[bool]:
    """For each layer, whether it has experts; a list's length is not checked."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(num_layers)]
    return [bool(one) for one in frequency]


def frequency_of(layers: Collection[int], num_layers: int) -> list[int]:
    """The list that gives experts to ``layers``."""
    return [int(layer in layers) for layer in range(num_layers)]


def as_flag(frequency: list[int]) -> str:
    """A list as the flag takes it."""
    return str(frequency).replace(" ", "")


def _read(text: str) -> Frequency:
    """The value of ``text``, which Python parses and does not evaluate.

    Raises:
        ValueError: not a number, a list of numbers, or sums and products of these; or too large.
    """
    if len(text) > LONGEST_TEXT or not TEXT.fullmatch(text):
        raise ValueError
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, 0)
    except (SyntaxError, RecursionError, MemoryError):  # brackets without a partner, or too many
        raise ValueError from None


def _value(node: ast.expr, depth: int) -> Frequency:
    if depth > DEEPEST:
        raise ValueError
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.List):
        items = [_value(item, depth + 1) for item in node.elts]
        if not all(isinstance(item, int) for item in items):
            raise ValueError
        return [item for item in items if isinstance(item, int)]
    if not isinstance(node, ast.BinOp):
        raise ValueError
    left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
    lists = isinstance(left, list) + isinstance(right, list)
    if isinstance(node.op, ast.Add) and lists != 1:
        _bounded(sum(len(one) if isinstance(one, list) else one for one in (left, right)))
        return left + right  # type: ignore[operator]
    if isinstance(node.op, ast.Mult) and lists < 2:
        first, second = (len(one) if isinstance(one, list) else one for one in (left, right))
        _bounded(first * second)
        return left * right  # type: ignore[operator]
    raise ValueError


def _bounded(number: int) -> int:
    if number > MOST_LAYERS:
        raise ValueError
    return number
