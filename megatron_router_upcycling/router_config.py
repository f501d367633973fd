"""What a router is: its kind, its numbers of routers, experts and keys, and how scores combine.

Pure: imports neither torch nor Megatron. A ``RouterConfig`` is what the converter records in a
checkpoint's manifest, what the ``upcycling:`` section of a YAML file holds, and what the layer spec
builds a router from.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling.errors import UserError

ROUTERS = ("mixture", "linear")
POOLINGS = ("sum", "max")
GROUPINGS = ("greedy", "optimal", "consecutive")


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a mixture router that follow from the heads and the numbers asked for.

    Paper, section 5.2.1. With H heads of size d: ``num_routers`` m, ``num_experts`` n,
    ``keys_per_expert`` c, ``router_width`` d' (query_weight is [m, d', D], expert_key is [n*c, d']).
    """

    num_routers: int
    num_experts: int
    keys_per_expert: int
    router_width: int
    head_splits: int  # parts each head is cut into before grouping (m > H), else 1
    heads_per_set: int  # (part-)heads merged into one query map or key


@dataclass(frozen=True)
class RouterConfig:
    """Options of an upcycled router. ``num_routers=None`` stands for the paper's best, m = n.

    ``num_experts`` and ``top_k`` count Megatron's experts. With ``granularity`` G they are shards of
    ``num_copies`` n = ``num_experts`` / G copies of the dense FFN; shards of one copy start with equal keys.
    """

    router: str = "mixture"
    num_experts: int = 8
    top_k: int = 2
    num_routers: int | None = None
    pooling: str = "sum"
    grouping: str = "greedy"
    pre_softmax: bool = True
    granularity: int = 1

    @property
    def num_copies(self) -> int:
        return self.num_experts // self.granularity

    def __post_init__(self) -> None:
        for name, choices in (("router", ROUTERS), ("pooling", POOLINGS), ("grouping", GROUPINGS)):
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
        if self.num_routers is None and self.router == "mixture":
            object.__setattr__(self, "num_routers", self.num_copies)

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
        for name, value in values.items():
            kind = type(getattr(cls, name))  # of the default
            if type(value) not in ((int, type(None)) if kind is type(None) else (kind,)):
                raise UserError(f"{source}: router option {name} cannot be {str(value)[:40]!r}")
        return cls(**values)

    def shape(self, num_heads: int, head_dim: int) -> RouterShape:
        """Sizes of this mixture router over ``num_heads`` query heads of ``head_dim``, its n copies apart."""
        assert self.router == "mixture" and self.num_routers is not None
        return router_shape(num_heads, head_dim, self.num_routers, self.num_copies)


def router_shape(num_heads: int, head_dim: int, num_routers: int, num_experts: int) -> RouterShape:
    """Apply the paper's rules for m routers over n experts (section 5.2.1, table 2).

    m = n: one key an expert. m < n: heads duplicated n/m times. m > n: m/n keys an expert.
    m > H: each head is first split in m/H parts.

    Raises:
        UserError: the numbers do not divide; names them and the nearest number of routers that works.
    """
    m, n, H, d = num_routers, num_experts, num_heads, head_dim

    def works(m: int) -> bool:
        return m >= 1 and (
            (n % m == 0 or m % n == 0) and (H % m == 0 if m <= H else m % H == 0 and d % (m // H) == 0)
        )

    if not works(m):
        usable = [k for k in range(1, max(H * d, n) + 1) if works(k)]
        nearest = sorted(sorted(usable, key=lambda k: abs(k - m))[:3])
        asked = f"--num-experts {n}, and as many routers" if m == n else f"--num-routers {m}"
        raise UserError(
            f"{asked}: does not fit {H} attention heads of size {d} and {n} experts (the number of routers"
            f" must divide or be a multiple of both); nearest --num-routers that work: "
            + ", ".join(map(str, nearest))
        )
    head_splits = max(1, m // H)
    heads_per_set = H * head_splits // m
    return RouterShape(
        num_routers=m,
        num_experts=n,
        keys_per_expert=max(1, m // n),
        router_width=heads_per_set * d // head_splits,
        head_splits=head_splits,
        heads_per_set=heads_per_set,
    )
