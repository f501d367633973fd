"""Is a pickle harmless to read? Its operations are followed here without building anything.

``safe_pickle`` refuses what a pickle may name; a hostile one can also harm the process that reads it with
nothing but plain data. Refused here, before Python's own unpickler sees a byte:

- a place in the memo far beyond what the pickle can fill (ten bytes would ask for 32 GB);
- tuples of tuples of tuples (the hash of one overflows the C stack, or takes for ever);
- attributes set on a class rather than on an object, which would change it for the whole process;
- operations that neither Python 3 nor PyTorch writes: extension codes, text protocols, huge integers.
"""

import pickle
from typing import Any

MOST_ITEMS = 10_000  # of a tuple and all tuples within; Python's random state has 630
CLASS = -1  # on the simulated stack: a class; otherwise the number of items of a tuple, 1 for all else

# Operation -> bytes of its argument. Negative: that many bytes give the argument's length.
PUSHES = {
    pickle.NONE: 0, pickle.NEWTRUE: 0, pickle.NEWFALSE: 0, pickle.EMPTY_TUPLE: 0, pickle.EMPTY_LIST: 0,
    pickle.EMPTY_DICT: 0, pickle.EMPTY_SET: 0, pickle.BININT: 4, pickle.BININT1: 1, pickle.BININT2: 2,
    pickle.BINFLOAT: 8, pickle.LONG1: -1, pickle.SHORT_BINUNICODE: -1, pickle.BINUNICODE: -4,
    pickle.BINUNICODE8: -8, pickle.SHORT_BINBYTES: -1, pickle.BINBYTES: -4, pickle.BINBYTES8: -8,
    pickle.SHORT_BINSTRING: -1, pickle.BINSTRING: -4, pickle.BYTEARRAY8: -8,
}  # fmt: skip
# Operation -> how many objects it makes one of; None: all since the last mark.
TUPLES = {pickle.TUPLE: None, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3, pickle.FROZENSET: None}
MAKES = {pickle.REDUCE: 2, pickle.NEWOBJ: 2, pickle.NEWOBJ_EX: 3, pickle.BINPERSID: 1}
# Operation -> how many objects go into the one below them.
FILLS = {
    pickle.APPEND: 1, pickle.SETITEM: 2, pickle.BUILD: 1, pickle.APPENDS: None, pickle.SETITEMS: None,
    pickle.ADDITEMS: None,
}  # fmt: skip
MEMOS = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4, pickle.BINGET: 1, pickle.LONG_BINGET: 4}
OTHERS = {pickle.PROTO: 1, pickle.FRAME: 8}


def _by_number(operations: dict[bytes, Any]) -> dict[int, Any]:
    return {operation[0]: value for operation, value in operations.items()}


_PUSHES, _TUPLES = _by_number(PUSHES), _by_number(TUPLES)
_MAKES, _FILLS = _by_number(MAKES), _by_number(FILLS)
_MEMOS, _OTHERS = _by_number(MEMOS), _by_number(OTHERS)
_GETS = (pickle.BINGET[0], pickle.LONG_BINGET[0])
_MEMOIZE, _MARK, _STOP = pickle.MEMOIZE[0], pickle.MARK[0], pickle.STOP[0]
_GLOBAL, _STACK_GLOBAL = pickle.GLOBAL[0], pickle.STACK_GLOBAL[0]
_POP, _POP_MARK, _DUP, _BUILD = pickle.POP[0], pickle.POP_MARK[0], pickle.DUP[0], pickle.BUILD[0]


class Refused(Exception):
    """A pickle that is not harmless, or not whole; the message says why."""


def check(content: bytes) -> None:
    """Follow the operations of the pickle in ``content`` up to its end.

    Takes about a third of a second for a million operations.

    Raises:
        Refused: an operation that does harm, that no checkpoint needs, or that has no end.
    """
    try:
        _follow(content)
    except IndexError:  # of the stack, the marks or the content
        raise Refused("ends early or takes what is not there") from None


def _follow(content: bytes) -> None:
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    position = 0

    def pop(count: int | None) -> list[int]:
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise IndexError
        taken = stack[start:]
        del stack[start:]
        return taken

    while (operation := content[position]) != _STOP:
        position += 1
        if (width := _PUSHES.get(operation)) is not None:
            if width < 0:
                length = int.from_bytes(content[position : position - width], "little")
                position += length - width
            else:
                position += width
            stack.append(1)
        elif operation == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif (width := _MEMOS.get(operation)) is not None:
            place = int.from_bytes(content[position : position + width], "little")
            position += width
            if operation in _GETS:
                stack.append(memo.get(place, 1))
            elif place > len(content):
                raise Refused(f"numbers its {place}th object")
            else:
                memo[place] = stack[-1]
        elif operation in _TUPLES:
            items = 1 + sum(map(abs, pop(_TUPLES[operation])))
            if items > MOST_ITEMS:
                raise Refused(f"holds a tuple of more than {MOST_ITEMS} items")
            stack.append(items)
        elif operation == _MARK:
            marks.append(len(stack))
        elif operation in _FILLS:
            pop(_FILLS[operation])
            if stack[-1] == CLASS:
                raise Refused("changes a class")
        elif operation in _MAKES:
            pop(_MAKES[operation])
            stack.append(1)
        elif operation == _GLOBAL:
            position = content.index(b"\n", content.index(b"\n", position) + 1) + 1
            stack.append(CLASS)
        elif operation == _STACK_GLOBAL:
            pop(2)
            stack.append(CLASS)
        elif operation in _OTHERS:
            position += _OTHERS[operation]
        elif operation == _POP:
            stack.pop() if not marks or marks[-1] < len(stack) else marks.pop()
        elif operation == _POP_MARK:
            pop(None)
        elif operation == _DUP:
            stack.append(stack[-1])
        else:
            raise Refused(f"holds operation {bytes([operation])!r}, which no checkpoint needs")
