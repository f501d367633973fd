"""Which layers have experts, as Megatron's ``--moe-layer-freq`` gives it.

A number N gives every Nth layer experts, from the first one on. A list has a 0 or 1 for each layer and may be
written as sums and multiples, as in ``[0]+[1]*23`` or ``([0]+[1]*3)*6``. Megatron evaluates such a text as
Python, so that ``[0]*10**12`` never returns. Here Python only parses it, and its size is limited.
"""

import ast
import re
from typing import Any

from megatron_router_upcycling.errors import UserError

MOST_LAYERS = 10_000
LONGEST_TEXT = 20_000  # characters
TEXT = re.compile(r"[\d\[\]()+*,\s]+")


def layer_frequency(value: Any, source: str = "--moe-layer-freq") -> int | list[int]:
    """``value`` (a text, a number or a list) as Megatron reads it; error messages begin with ``source``."""
    found = value
    if isinstance(value, str):
        try:
            readable = len(value) <= LONGEST_TEXT and TEXT.fullmatch(value)
            found = _value(ast.parse(value.strip(), mode="eval").body) if readable else None
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # last two: deep nesting
            found = None
    listed = isinstance(found, list) and all(type(one) is int and one in (0, 1) for one in found)
    if not listed and not (type(found) is int and found >= 1):
        raise UserError(
            f"{source} {value}: must be a number, or a list with a 0 or 1 for each layer, as in ([0]+[1]*3)*2"
        )
    return found


def has_experts(frequency: int | list[int], num_layers: int) -> list[bool]:
    """For each layer, whether it has experts; a list's length is not checked."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(num_layers)]
    return [bool(one) for one in frequency]


def _value(node: ast.expr) -> Any:
    """The value of numbers, lists, sums and products; ValueError or TypeError for all else."""
    value: Any = None
    match node:
        case ast.Constant(value=int(number)):
            value = number
        case ast.List(elts=items):
            value = [_value(item) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            value = _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _value(left), _value(right)
            value = first * second if _size(first) * _size(second) <= MOST_LAYERS else None
    if value is None or _size(value) > MOST_LAYERS:
        raise ValueError
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, list) else value
