"""What a router is: its kind, its numbers of routers, experts and keys, and how scores combine.

Pure: imports neither torch nor Megatron. A ``RouterConfig`` is what the converter records in a
checkpoint's manifest, what the ``upcycling:`` section of a YAML file holds, and what the layer spec
builds a router from.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling.errors import UserError

ROUTERS = ("mixture", "linear", "mlp", "switch", "locmoe")
LOCALITY_LOSS_COEFF = 0.01
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
        if self.router == "switch" and (self.top_k != 1 or not self.pre_softmax):
            raise UserError(
                "--router switch: sends a token to one expert and weighs it by its softmax (Switch"
                " Transformer); give --top-k 1 and --moe-router-pre-softmax"
            )
        if self.router == "locmoe":
            self._check_locmoe()
        elif self.locality_loss_coeff is not None:
            raise UserError(f"locality_loss_coeff: --router {self.router} has no such loss; locmoe has")

    def _check_locmoe(self) -> None:
        if self.granularity > 1:
            raise UserError(
                f"--granularity {self.granularity}: --router locmoe has no keys for shards to share;"
                " leave it out"
            )
        if self.locality_loss_coeff is None:
            object.__setattr__(self, "locality_loss_coeff", LOCALITY_LOSS_COEFF)
        elif not 0 <= self.locality_loss_coeff < math.inf:
            raise UserError(f"locality_loss_coeff {self.locality_loss_coeff}: must be 0 or more")

    def check_hidden_size(self, hidden_size: int) -> None:
        """Raise UserError where the model's hidden size does not suit this router."""
        if self.router == "locmoe" and hidden_size % self.num_experts:
            raise UserError(
                f"--router locmoe: averages equal slices of the hidden state, one an expert, and"
                f" {self.num_experts} experts do not divide a hidden size of {hidden_size}; choose"
                " --num-experts that does"
            )

    def describe(self) -> str:
        """The kind of router in words, in the plural."""
        if self.router == "mixture":
            return f"mixtures of {self.num_routers} routers"
        names = {"linear": "linear", "mlp": "MLP", "switch": "Switch", "locmoe": "LocMoE"}
        return f"{names[self.router]} routers"

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
        assert self.router == "mixture" and self.num_routers is not None
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
