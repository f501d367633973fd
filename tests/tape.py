"""What a CUDA graph does, on the CPU: operations are captured with their tensors, and replayed without Python
between them.

As on a GPU, a capture has no effect on memory from before it (there nothing is computed at all), and a replay
reads and writes the tensors of the capture, whatever Python or its state would have chosen since.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape:
    """The operations of one capture, in order."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []
        self.own: set[int] = set()  # memory that was made in the capture
        self.held: list[Any] = []  # so that it is nobody else's afterwards

    def made(self, *tensors: Any) -> None:
        self.held += tensors
        self.own |= {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)}

    def call(self, compute: Callable[..., Any], args: Any, kwargs: Any, written: list[torch.Tensor]) -> Any:
        """Record ``compute(*args, **kwargs)``, which writes into ``written`` or makes new tensors."""
        kept = [] if written else None
        result = None
        if all(tensor.untyped_storage().data_ptr() in self.own for tensor in written):
            result = compute(*args, **kwargs)
        if kept is None:
            kept = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.made(*kept)
        self.steps.append((compute, args, kwargs, kept))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for compute, args, kwargs, kept in self.steps:
            result = compute(*args, **kwargs)
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for tensor, value in zip(kept, leaves, strict=False):
                tensor.copy_(value)


def written_by(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments into which the aten operation ``func`` writes."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in names for leaf in tree_leaves(given.get(name)) if isinstance(leaf, torch.Tensor)]


def is_view(func: Any) -> bool:
    returns = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


class Capture(TorchDispatchMode):
    """Captures the operations on CPU tensors in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == "aten::_local_scalar_dense":
            raise RuntimeError(f"{func} waits for a value inside a capture")
        if is_view(func):
            return func(*args, **kwargs)
        written = written_by(func, args, kwargs)
        result = self.tape.call(func, args, kwargs, written)
        return written[0] if written and result is None else result
