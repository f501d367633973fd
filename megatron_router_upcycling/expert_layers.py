"""Which layers have experts, as Megatron's ``--moe-layer-freq`` says it.

A number N gives every Nth layer experts, from the first one on. A list has a 0 or 1 for each layer and may be
written as sums and multiples, as in ``[0]+[1]*23`` or ``([0]+[1]*3)*6``. Megatron evaluates such a text as
Python, which a text such as ``[0]*10**12`` never leaves. Here it is parsed, within bounds.

Pure: imports neither torch nor Megatron.
"""

import re
from collections.abc import Collection
from typing import Any

from megatron_router_upcycling.errors import UserError

MOST_LAYERS = 10_000
LONGEST_TEXT = 100_000  # characters
DEEPEST = 50  # brackets within brackets
TOKEN = re.compile(r"\s*((?:0|[1-9]\d{0,8})(?!\d)|[\[\]()+*,])")

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
            found = _Pattern(value).read()
        except (ValueError, IndexError):  # IndexError: the text ends where something should follow
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


class _Pattern:
    """A reader of this grammar, with a method for each of its rules.

    sum: product, or product + sum; product: item, or item * product; item: integer, (sum), or [sum, sum, ...]
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEXT:
            raise ValueError
        self.rest = [match[1] for match in TOKEN.finditer(text)]
        if "".join(self.rest) != "".join(text.split()):
            raise ValueError  # something else stands between the tokens
        self.rest.reverse()

    def read(self) -> Frequency:
        value = self._sum(0)
        if self.rest:
            raise ValueError
        return value

    def _next_is(self, token: str) -> bool:
        """Whether ``token`` comes next; it is taken then."""
        found = bool(self.rest) and self.rest[-1] == token
        if found:
            self.rest.pop()
        return found

    def _sum(self, depth: int) -> Frequency:
        value = self._product(depth)
        while self._next_is("+"):
            value = _add(value, self._product(depth))
        return value

    def _product(self, depth: int) -> Frequency:
        value = self._item(depth)
        while self._next_is("*"):
            value = _multiply(value, self._item(depth))
        return value

    def _item(self, depth: int) -> Frequency:
        if depth > DEEPEST:
            raise ValueError
        if self._next_is("("):
            value = self._sum(depth + 1)
            if not self._next_is(")"):
                raise ValueError
            return value
        if not self._next_is("["):
            return int(self.rest.pop())  # ValueError for any other sign
        found: list[int] = []
        while not self._next_is("]"):
            one = self._sum(depth + 1)
            if isinstance(one, list):
                raise ValueError
            found.append(one)
            if not self._next_is(",") and self.rest[-1] != "]":
                raise ValueError
        return found


def _add(a: Frequency, b: Frequency) -> Frequency:
    if isinstance(a, int) and isinstance(b, int):
        return _bounded(a + b)
    if isinstance(a, list) and isinstance(b, list):
        _bounded(len(a) + len(b))
        return a + b
    raise ValueError


def _multiply(a: Frequency, b: Frequency) -> Frequency:
    if isinstance(a, int) and isinstance(b, int):
        return _bounded(a * b)
    if isinstance(a, int):
        a, b = b, a
    if isinstance(a, int) or isinstance(b, list):
        raise ValueError
    _bounded(len(a) * b)
    return a * b


def _bounded(number: int) -> int:
    if number > MOST_LAYERS:
        raise ValueError
    return number
