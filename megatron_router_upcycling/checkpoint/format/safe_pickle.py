"""Is a pickle harmless to read? Its operations are followed here without building anything.

``safe_load`` refuses what a pickle may name; a hostile one can also harm the process that reads it with
nothing but plain data. Refused here, before Python's own unpickler sees a byte:

- a place in the memo far beyond what the pickle can fill (ten bytes would ask for 32 GB);
- tuples of tuples of tuples (the hash of one overflows the C stack, or takes for ever);
- attributes set on a class rather than on an object, which would change it for the whole process;
- operations that neither Python 3 nor PyTorch writes: extension codes, text protocols, huge integers.
"""

import argparse
import collections
import copyreg
import functools
import io
import pathlib
import pickle
import re
import signal
import sys
import types
import zipfile
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError, reason

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


# Plain data that is built as what it is. The constructor of an enum or a container runs nothing.
REAL: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,
    ("signal", "Signals"): signal.Signals,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
}
# Names that become inert records and can be written back: PyTorch's checkpoint metadata, Megatron's enums.
CARRIED = re.compile(
    r"torch\.distributed\.checkpoint\.\w+\.\w+"
    r"|torch\.distributed\._shard\.sharded_tensor\.metadata\.\w+"  # where they were before PyTorch 2.3
    r"|megatron\.core\.(enums|transformer\.enums|rerun_state_machine)\.\w+"
    r"|megatron\.core\.optimizer\.(optimizer_config\.)?\w+Config"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.MCore\w+"
)
# Names that become inert records and go no further: tensors and arrays within the common state.
SEEN = re.compile(
    r"torch\.\w*Storage|torch\.storage\.\w*Storage|torch\._utils\._rebuild_\w+"
    r"|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|_?io\.BytesIO|_codecs\.encode"
    r"|megatron\.(\w+\.)*enums\.\w+"  # of an older Megatron, among its arguments
)


class Inert:
    """An object whose class was not imported. Subclasses made by ``inert_class`` carry its name."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.args:
            return (type(self), self.args) if self.state is None else (type(self), self.args, self.state)
        return copyreg.__newobj__, (type(self),), self.state  # type: ignore[attr-defined]

    def __repr__(self) -> str:  # its content may be of any size and depth
        return f"{type(self).__module__}.{type(self).__name__}"


@functools.cache
def inert_class(module: str, name: str) -> type[Inert]:
    """The record class that stands for ``module.name``."""
    return type(name, (Inert,), {"__module__": module})


def inert(module: str, name: str, *args: Any, state: Any = None) -> Inert:
    """A record that will be unpickled elsewhere as a ``module.name``."""
    record = inert_class(module, name)(*args)
    record.state = state
    return record


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in REAL:
            return REAL[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if CARRIED.fullmatch(f"{module}.{name}") or SEEN.fullmatch(f"{module}.{name}"):
            return inert_class(module, name)
        raise UserError(f"names {module}.{name}, which no checkpoint needs; it was not run")

    def persistent_load(self, pid: Any) -> Inert:
        return inert("torch.storage", "UntypedStorage", pid)


class _Pickler(pickle.Pickler):
    """Writes records under the names they stand for.

    Pickle looks a class up by importing its module. While it writes, modules of that name hold the record
    classes; nothing else in them is looked up.
    """

    def dump(self, value: Any) -> None:
        modules: dict[str, types.ModuleType] = {}
        for cls in Inert.__subclasses__():
            if CARRIED.fullmatch(f"{cls.__module__}.{cls.__name__}"):
                module = modules.setdefault(cls.__module__, types.ModuleType(cls.__module__))
                setattr(module, cls.__name__, cls)
        hidden = {name: sys.modules[name] for name in modules if name in sys.modules}
        sys.modules.update(modules)
        try:
            super().dump(value)
        finally:
            for name in modules:
                del sys.modules[name]
            sys.modules.update(hidden)


def loads(content: bytes, source: Any) -> Any:
    """Unpickle ``content``; ``source`` is named in errors.

    Raises:
        UserError: a truncated or damaged pickle, one that names something outside the allow-list, or one
            that would harm the process.
    """
    try:
        check(content)
        return _Unpickler(io.BytesIO(content)).load()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"{source}: damaged or half-written ({reason(error)})") from None


def dumps(value: Any) -> bytes:
    """Pickle ``value``, inert records under the names they stand for.

    Raises:
        pickle.PicklingError: a record that is read only, such as a tensor of the common state.
        RecursionError: lists or mappings that nest too deep.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def namespace(values: dict[str, Any]) -> argparse.Namespace:
    """Arguments of these names, whatever they are."""
    made = argparse.Namespace()
    vars(made).update(values)
    return made


def load_archive(content: bytes, source: Any) -> Any:
    """The object in a ``torch.save`` file; tensors within come as inert records.

    Raises:
        UserError: as ``loads``, or not a file that ``torch.save`` wrote.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickled = read_stored(archive, name)
    except Exception as error:  # not a zip file, or a damaged one
        raise UserError(f"{source}: damaged or half-written ({reason(error)})") from None
    return loads(pickled, source)


def read_stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record of a ``torch.save`` file, which is never compressed: it is no larger than the file.

    Raises:
        Exception: of any kind, on a damaged file.
    """
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    return archive.read(record)


def dump_archive(value: Any) -> bytes:
    """``value`` as a ``torch.save`` file. Raises as ``dumps``."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=_Pickler))
    return buffer.getvalue()
