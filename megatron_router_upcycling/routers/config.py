"""What a router is: its kind, its numbers of routers, experts and keys, and how scores combine.

Pure: imports neither torch nor Megatron. A ``RouterConfig`` is what a checkpoint's manifest records, what the
``upcycling:`` section of a YAML file holds, and what the layer spec builds a router from.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds

POOLINGS = ("sum", "max")


@dataclass(frozen=True)
class Recorded:
    """A dataclass of options that manifests and YAML files hold as a mapping."""

    # Options of earlier versions that manifests still hold; one with another value is refused.
    RETIRED: ClassVar[dict[str, Any]] = {}

    @classmethod
    def check_values(cls, values: Any, source: str) -> None:
        """Raise UserError, which names ``source``, unless all entries are fields of their types."""
        if not isinstance(values, dict):
            raise UserError(f"{source}: must be a mapping of options")
        fields = dataclasses.fields(cls)
        types = {field.name: typing.get_args(field.type) or (field.type,) for field in fields}
        for name, value in values.items():
            if name not in types:
                raise UserError(f"{source}: unknown option {name!r}; known: {', '.join(types)}")
            if type(value) not in types[name] and not (float in types[name] and type(value) is int):
                raise UserError(f"{source}: option {name} cannot be {str(value)[:40]!r}")

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Self:
        if isinstance(values, dict):
            retired = cls.RETIRED.items()
            values = {name: value for name, value in values.items() if (name, value) not in retired}
        cls.check_values(values, source)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a mixture: query_weight is [m, d', D], expert_key [n*c, d']."""

    num_routers: int  # m
    num_experts: int  # n
    router_width: int  # d'
    head_splits: int  # parts each head is cut into before grouping (m > H), else 1
    head_copies: int  # r, the routers that each head is part of
    heads_per_set: int  # (part-)heads merged into one query map or key


@dataclass(frozen=True)
class RouterConfig(Recorded):
    """Options of an upcycled router. ``num_routers=None`` means the paper's best, m = n.

    ``num_experts`` and ``top_k`` count Megatron's experts. With ``granularity`` G they are shards of
    ``num_copies`` n = ``num_experts`` / G copies of the dense FFN; shards of one copy start with equal keys.
    """

    RETIRED = {"grouping": "greedy"}

    router: str = "mixture"
    num_experts: int = 8
    top_k: int = 2
    num_routers: int | None = None
    pooling: str = "sum"
    pre_softmax: bool = True
    granularity: int = 1
    locality_loss_coeff: float | None = None  # of LocMoE's training

    @property
    def num_copies(self) -> int:
        return self.num_experts // self.granularity

    @property
    def kind(self) -> kinds.Kind:
        return kinds.get(self.router)

    def __post_init__(self) -> None:
        kind = self.kind
        if self.pooling not in POOLINGS:
            raise UserError(f"--pooling {self.pooling}: choose one of {', '.join(POOLINGS)}")
        for name in ("granularity", "num_experts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"--top-k {self.top_k}: must be between 1 and --num-experts {self.num_experts}")
        if self.num_experts % self.granularity or self.top_k % self.granularity:
            raise UserError(
                f"--granularity {self.granularity}: must divide the numbers of experts {self.num_experts}"
                f" and of experts a token {self.top_k}"
            )
        if self.locality_loss_coeff is not None:
            kind.check_has("locality_loss_coeff", f"locality_loss_coeff {self.locality_loss_coeff}")
        for name, value in kind.fill_in(self).items():
            object.__setattr__(self, name, value)

    def check_trains(self, flags: Mapping[str, Any]) -> None:
        """Refuse a router that Megatron does not train, or not with its ``flags``, as far as known."""
        softmax = flags.get("moe_router_score_function", "softmax") == "softmax"
        sinkhorn = flags.get("moe_router_load_balancing_type") == "sinkhorn"
        if self.top_k == 1 and not self.pre_softmax and softmax and not sinkhorn:
            raise UserError(
                "--top-k 1 with --no-moe-router-pre-softmax: the weight of a token's only expert is always 1,"
                " from which the router cannot learn; pass --moe-router-pre-softmax, or --top-k 2"
            )
        groups, chosen = flags.get("moe_router_num_groups"), flags.get("moe_router_group_topk")
        if not isinstance(chosen, int) or not isinstance(groups, int | None):
            return  # not given, or what the parser of training refuses
        n, k = self.num_experts, self.top_k
        if not groups or n % groups or chosen > min(groups, k) or k * groups > chosen * n:
            raise UserError(
                f"moe_router_group_topk {chosen}: --top-k {k} of {n} experts cannot come from {chosen} of"
                f" moe_router_num_groups {groups} equal groups, with one or more from each"
            )

    def describe(self) -> str:
        """The kind of router in words, as a layer has it."""
        return self.kind.words.format(router=self)

    def shape(self, num_heads: int, head_dim: int) -> RouterShape:
        """The sizes of a mixture over H heads of size d, by the paper's rules (section 5.2.1, table 2).

        m = n: one key an expert. m < n: the keys' heads are duplicated n/m times. m > n: m/n keys an expert.
        m > H: each head is first split in m/H parts. Where m neither divides H nor is a multiple of it, heads
        are duplicated too: each is part of r = m / gcd(H, m) routers of H / gcd(H, m) heads.
        """
        m, n, H, d = self.num_routers, self.num_copies, num_heads, head_dim
        assert m is not None
        if not _fits(m, n, H, d):
            usable = [k for k in range(1, max(H * d, n) + 1) if _fits(k, n, H, d)]
            nearest = sorted(sorted(usable, key=lambda k: abs(k - m))[:3])
            asked = f"--num-experts {n}, and as many routers" if m == n else f"--num-routers {m}"
            raise UserError(
                f"{asked}: does not fit {H} attention heads of size {d} and {n} experts (it must divide or be"
                " a multiple of the experts, and share a factor with the heads); nearest --num-routers that"
                f" work: {', '.join(map(str, nearest))}"
            )
        splits = m // H if m % H == 0 else 1
        copies = 1 if m % H == 0 else m // math.gcd(H, m)
        heads_per_set = H * splits * copies // m
        return RouterShape(m, n, heads_per_set * d // splits, splits, copies, heads_per_set)


def _fits(m: int, n: int, H: int, d: int) -> bool:
    if m < 1 or (n % m and m % n):
        return False
    return H % m == 0 or (m % H == 0 and d % (m // H) == 0) or (m % H != 0 and math.gcd(H, m) > 1)
