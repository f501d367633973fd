"""Pickles read and written without importing what they name.

Reading builds plain data and inert records, which stand for objects of classes on an allow-list; a pickle
that names anything else is refused. Writing gives the records back the names that they stand for.
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
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.format import pickle_check
from megatron_router_upcycling.errors import UserError, reason

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


class Pickler(pickle.Pickler):
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
        pickle_check.check(content)
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
    Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def namespace(values: dict[str, Any]) -> argparse.Namespace:
    """Arguments of these names, whatever they are."""
    made = argparse.Namespace()
    vars(made).update(values)
    return made
