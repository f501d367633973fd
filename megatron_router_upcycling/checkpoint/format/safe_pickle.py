"""Read and write pickles without importing the classes that they name.

Reading builds plain data, and inert records in place of objects of classes on an allow-list. A pickle that
names anything else, or whose plain data does harm, is refused. Writing restores the records' class names.
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
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from megatron_router_upcycling.errors import UserError, reason

# Plain data that is built as real objects: constructors of enums and containers run no foreign code.
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
# Names that become inert records and cannot be written back: tensors and arrays within the common state.
SEEN = re.compile(
    r"torch\.\w*Storage|torch\.storage\.\w*Storage|torch\._utils\._rebuild_\w+"
    r"|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|_?io\.BytesIO|_codecs\.encode"
    r"|megatron\.(\w+\.)*enums\.\w+"  # of an older Megatron, among its arguments
)

PYTHONS = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
HASHABLE = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.FROZENSET)
MOST_ITEMS = 10_000  # of a tuple and all tuples within; Python's random state has 630


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
    """The record class in place of ``module.name``."""
    return type(name, (Inert,), {"__module__": module})


def inert(module: str, name: str, *args: Any, state: Any = None) -> Inert:
    """A record that is unpickled elsewhere as a ``module.name``."""
    record = inert_class(module, name)(*args)
    record.state = state
    return record


def _counting(make: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation that makes a tuple or a frozenset, and counts what is within."""

    def load(self: Any) -> None:
        make(self)
        made = self.stack[-1]
        nested = (self.items.get(id(item), 1) for item in made if isinstance(item, tuple | frozenset))
        self.items[id(made)] = count = len(made) + sum(nested)
        if count > MOST_ITEMS:
            raise UserError(f"holds a tuple of more than {MOST_ITEMS} items")

    return load


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Python's own unpickler, not C's: its memo is a dict, so that a huge memo index takes no memory.

    Hashing nested tuples can overflow the stack or take forever, so their items are counted.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.items: dict[int, int] = {}  # of the tuple of that id, with those within

    def _build(self: Any) -> None:
        if not isinstance(self.stack[-2], Inert | argparse.Namespace | types.SimpleNamespace | dict):
            raise UserError("changes a class")
        self.load_build()

    def _refuse(self) -> None:
        raise UserError("holds an integer or an array of bytes that no checkpoint needs")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **PYTHONS,
        **{number: _counting(PYTHONS[number]) for (number,) in HASHABLE},
        pickle.BUILD[0]: _build,
        **dict.fromkeys(b"".join((pickle.INT, pickle.LONG, pickle.LONG4, pickle.BYTEARRAY8)), _refuse),
    }

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


class Pickler(pickle.Pickler):
    """Pickles records under their class names; meanwhile modules with these replace the real ones."""

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
    """Unpickle ``content``; ``source`` is named in errors."""
    try:
        return _Unpickler(content).load()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"{source}: damaged or half-written ({reason(error)})") from None


def dumps(value: Any) -> bytes:
    """Pickle ``value``; a record of a name in ``SEEN``, such as a tensor, raises ``pickle.PicklingError``."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def namespace(values: dict[str, Any]) -> argparse.Namespace:
    """A namespace of ``values``, whose names need not be identifiers."""
    made = argparse.Namespace()
    vars(made).update(values)
    return made
