"""The steps of a conversion: what becomes of each tensor and object of the dense checkpoint.

``upcycle.plan`` makes them and ``upcycle.execute`` carries them out. Each names the tensors or objects of the
dense checkpoint that it accounts for.
"""

from dataclasses import dataclass

from megatron_router_upcycling.checkpoint.names import at_layer
from megatron_router_upcycling.conversion.fine_grained import Cut


@dataclass(frozen=True)
class Keep:
    """Take tensors and objects over under their own names, their bytes untouched."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class CopyNorm:
    """Give a norm before the FFN its other name as well."""

    key: str
    other: str


@dataclass(frozen=True)
class CopyExperts:
    """Make ``target`` [L, n, ...] of n copies of ``key`` [L, ...], or of shards of copies.

    ``front`` is 1, or 0 for a layer under a key of its own, without the axis of layers.
    """

    key: str
    target: str
    num_experts: int
    front: int
    cut: Cut | None

    def shape(self, dense: tuple[int, ...]) -> tuple[int, ...]:
        sizes = self.cut.shape(dense) if self.cut else dense
        return (*sizes[: self.front], self.num_experts, *sizes[self.front :])


@dataclass(frozen=True)
class AlterExperts:
    """Make ``target`` [L, n, ...] of n copies of ``key`` [L, ...] that differ, each stored.

    ``front`` is as in ``CopyExperts``.
    """

    key: str
    target: str
    num_experts: int
    front: int


@dataclass(frozen=True)
class CopyShared:
    """Make a parameter of the shared expert, FC1 as it is and FC2 scaled."""

    key: str
    target: str
    scaled: bool


@dataclass(frozen=True)
class Draw:
    """Make ``key`` at random, with the dtype of ``like``, which goes or of which another step disposes."""

    key: str
    shape: tuple[int, ...]
    like: str
    goes: bool


@dataclass(frozen=True)
class MakeRouters:
    """Make the routers' parameters: key and shape over all layers; ``layers``: only for these, each under a
    key of its own."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[int, ...] | None

    def made(self) -> dict[str, tuple[int, ...]]:
        if self.layers is None:
            return dict(self.parameters)
        return {at_layer(key, layer): shape[1:] for layer in self.layers for key, shape in self.parameters}


@dataclass(frozen=True)
class AddExtraStates:
    """Write the empty entries that modules of an MoE layer look for; ``keys`` go: those of the dense FFN,
    and those that only a torch_dist checkpoint can hand on."""

    keys: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class WriteCommonState:
    """Write the common state of a fresh MoE run; the dense run's goes. ``made``: none where it is a file."""

    keys: tuple[str, ...]
    made: tuple[str, ...]


@dataclass(frozen=True)
class LeaveOut:
    """Training state that the MoE run does not go on from."""

    keys: tuple[str, ...]


Step = (
    Keep
    | CopyNorm
    | CopyExperts
    | AlterExperts
    | CopyShared
    | Draw
    | MakeRouters
    | AddExtraStates
    | WriteCommonState
    | LeaveOut
)


def accounted(step: Step) -> tuple[str, ...]:
    """The entries of the dense checkpoint that ``step`` accounts for."""
    match step:
        case CopyExperts(key=key) | AlterExperts(key=key) | Draw(like=key, goes=True):
            return (key,)
        case Keep(keys=keys) | AddExtraStates(keys=keys) | WriteCommonState(keys=keys) | LeaveOut(keys=keys):
            return keys
        case _:
            return ()
