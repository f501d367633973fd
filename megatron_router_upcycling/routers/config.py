"""What a router is: its kind, its numbers of routers, experts and keys, and how scores combine.

Pure: imports neither torch nor Megatron. A ``RouterConfig`` is what the converter records in a
checkpoint's manifest, what the ``upcycling:`` section of a YAML file holds, and what the layer spec
builds a router from.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.shape import RouterShape, router_shape

POOLINGS = ("sum", "max")
GROUPINGS = ("greedy", "optimal", "consecutive")


@dataclass(frozen=True)
class RouterConfig:
    """Options of an upcycled router. ``num_routers=None`` means the paper's best, m = n.

    ``num_experts`` and ``top_k`` count Megatron's experts. With ``granularity`` G they are shards of
    ``num_copies`` n = ``num_experts`` / G copies of the dense FFN; shards of one copy start with equal keys.

    ``locality_loss_coeff`` is LocMoE's alone and a matter of training.
    """

    router: str = "mixture"
    num_experts: int = 8
    top_k: int = 2
    num_routers: int | None = None
    pooling: str = "sum"
    grouping: str = "greedy"
    pre_softmax: bool = True
    granularity: int = 1
    locality_loss_coeff: float | None = None

    @property
    def num_copies(self) -> int:
        return self.num_experts // self.granularity

    @property
    def kind(self) -> kinds.Kind:
        """The row of this kind of router."""
        return kinds.get(self.router)

    def __post_init__(self) -> None:
        kind = self.kind
        for name, choices in (("pooling", POOLINGS), ("grouping", GROUPINGS)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: choose one of {', '.join(choices)}")
        if self.granularity < 1:
            raise UserError(f"--granularity {self.granularity}: must be at least 1")
        if self.num_experts < 1:
            raise UserError(f"--num-experts {self.num_experts}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"--top-k {self.top_k}: must be between 1 and --num-experts {self.num_experts}")
        if self.num_experts % self.granularity or self.top_k % self.granularity:
            raise UserError(
                f"--granularity {self.granularity}: must divide the numbers of experts {self.num_experts}"
                f" and of experts a token {self.top_k}"
            )
        if self.locality_loss_coeff is not None and "locality_loss_coeff" not in kind.options:
            have = " and ".join(kinds.names_with("locality_loss_coeff"))
            raise UserError(f"locality_loss_coeff: --router {self.router} has no such loss; {have} has")
        for name, value in kind.settle(self).items():
            object.__setattr__(self, name, value)

    def check_trains(self, flags: Mapping[str, Any]) -> None:
        """Refuse what Megatron does not train, or not as its flags say.

        Args:
            flags: Megatron's, as far as they are known before training.
        """
        softmax = flags.get("moe_router_score_function", "softmax") == "softmax"
        sinkhorn = flags.get("moe_router_load_balancing_type") == "sinkhorn"
        if self.top_k == 1 and not self.pre_softmax and softmax and not sinkhorn:
            raise UserError(
                "--top-k 1 with --no-moe-router-pre-softmax: the weight of a token's only expert is always 1:"
                " the router cannot learn from the loss, and Megatron refuses to train it; pass"
                " --moe-router-pre-softmax, or --top-k 2"
            )
        groups, chosen = flags.get("moe_router_num_groups"), flags.get("moe_router_group_topk")
        if not isinstance(chosen, int) or not isinstance(groups, int | None):
            return  # not given, or what the parser of training refuses
        if not groups or self.num_experts % groups:
            raise UserError(
                f"moe_router_group_topk {chosen}: needs a moe_router_num_groups that divides the"
                f" {self.num_experts} experts, and it is {groups}"
            )
        if self.top_k * groups > chosen * self.num_experts or chosen > min(groups, self.top_k):
            raise UserError(
                f"moe_router_group_topk {chosen}: --top-k {self.top_k} experts must come from as many of the"
                f" {groups} groups of {self.num_experts // groups} experts, with one or more from each"
            )

    def describe(self) -> str:
        """The kind of router in words, as a layer has it."""
        return self.kind.words.format(router=self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "RouterConfig":
        """Build from a mapping; ``source`` (a file name) is named when an entry is unknown."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"{source}: unknown router option {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        check_types(cls, values, f"{source}: router option")
        return cls(**values)

    def shape(self, num_heads: int, head_dim: int) -> RouterShape:
        """Sizes of this mixture router over ``num_heads`` query heads of ``head_dim``, its n copies apart."""
        assert self.num_routers is not None
        return router_shape(num_heads, head_dim, self.num_routers, self.num_copies)


def check_types(options: type, values: dict[str, Any], place: str) -> None:
    """Raise UserError where a value is not of the type of its field in the dataclass ``options``."""
    for field in dataclasses.fields(options):
        if field.name not in values:
            continue
        value = values[field.name]
        allowed = typing.get_args(field.type) or (field.type,)
        if type(value) not in allowed and not (float in allowed and type(value) is int):
            raise UserError(f"{place} {field.name} cannot be {str(value)[:40]!r}")
