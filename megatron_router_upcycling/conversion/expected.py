"""What the tensors of a conversion must hold, box by box: the dense checkpoint's values, or computed ones."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint


@dataclass(frozen=True, eq=False)
class Computed:
    """Values that ``compute`` gives at one index of each of the first ``num_axes`` axes of ``shape``."""

    compute: Callable[..., torch.Tensor]
    shape: Shape
    num_axes: int

    def boxes(self, box: Box) -> Iterator[Box]:
        """The boxes that are computed at a time and overlap ``box``."""
        count, rest = self.num_axes, self.shape[self.num_axes :]
        for index in itertools.product(*map(range, box.offsets[:count], box.ends[:count])):
            yield Box((*index, *(0 for _ in rest)), (*(1 for _ in index), *rest))

    def values(self, box: Box) -> torch.Tensor:
        """The values of one of the ``boxes``."""
        return self.compute(*box.offsets[: self.num_axes])

    def expected(self, check: str, dtype: torch.dtype) -> "Expected":
        """A tensor of these values."""
        return Expected(check, self.shape, dtype, lambda box: [Origin(box, self, box)])


class Origin(NamedTuple):
    """``box`` of a new tensor holds what ``place`` of ``source`` holds, element for element in their order.

    ``source``: a key of the dense checkpoint as the plan sees it (``Plan.source``), or computed values.
    """

    box: Box
    source: str | Computed
    place: Box


class Expected(NamedTuple):
    """A tensor of the new checkpoint, and where the values of a box of it come from.

    ``check``: the kind of finding that ``verify`` makes of a difference.
    """

    check: str
    shape: Shape
    dtype: torch.dtype
    origins: Callable[[Box], Iterable[Origin]]


def copy_of(source: Checkpoint, key: str, check: str) -> Expected:
    """A tensor that is ``key`` of the dense checkpoint."""
    stored = source.tensors[key]
    return Expected(check, stored.shape, stored.dtype, lambda box: [Origin(box, key, box)])


class InTurn:
    """The items that ``make`` yields, by number; one is kept (a random router needs those before it)."""

    def __init__(self, make: Callable[[], Iterator[tuple[torch.Tensor, ...]]]) -> None:
        self.make = make
        self._next, self._made = 0, make()
        self._item: tuple[torch.Tensor, ...] = ()

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        if number + 1 < self._next:
            self._next, self._made = 0, self.make()
        while self._next <= number:
            self._next, self._item = self._next + 1, next(self._made)
        return self._item
