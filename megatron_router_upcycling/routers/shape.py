"""The sizes of a mixture of routers (arXiv 2509.00679, section 5.2.1, table 2)."""

import math
from dataclasses import dataclass

from megatron_router_upcycling.errors import UserError


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a mixture router that follow from the heads and the numbers asked for.

    With H heads of size d: ``num_routers`` m, ``num_experts`` n, ``keys_per_expert`` c, ``router_width`` d'
    (query_weight is [m, d', D], expert_key is [n*c, d']).
    """

    num_routers: int
    num_experts: int
    keys_per_expert: int
    router_width: int
    head_splits: int  # parts each head is cut into before grouping (m > H), else 1
    head_copies: int  # r, the routers that each head is part of
    heads_per_set: int  # (part-)heads merged into one query map or key


def router_shape(num_heads: int, head_dim: int, num_routers: int, num_experts: int) -> RouterShape:
    """Apply the paper's rules for m routers over n experts.

    m = n: one key an expert. m < n: the keys' heads duplicated n/m times. m > n: m/n keys an expert.
    m > H: each head is first split in m/H parts. Where m neither divides H nor is a multiple of it, the rule
    of duplication is carried on: each head is part of r = m / gcd(H, m) routers of H / gcd(H, m) heads.

    Raises:
        UserError: the numbers do not divide; names them and the nearest number of routers that works.
    """
    m, n, H, d = num_routers, num_experts, num_heads, head_dim

    def works(m: int) -> bool:
        if n % m and m % n:
            return False
        return H % m == 0 or (m % H == 0 and d % (m // H) == 0) or (m % H != 0 and math.gcd(H, m) > 1)

    if m < 1 or not works(m):
        usable = [k for k in range(1, max(H * d, n) + 1) if works(k)]
        nearest = sorted(sorted(usable, key=lambda k: abs(k - m))[:3])
        asked = f"--num-experts {n}, and as many routers" if m == n else f"--num-routers {m}"
        raise UserError(
            f"{asked}: does not fit {H} attention heads of size {d} and {n} experts (the number of routers"
            " must divide or be a multiple of the experts, and share a factor with the heads); nearest"
            f" --num-routers that work: {', '.join(map(str, nearest))}"
        )
    head_splits = m // H if m % H == 0 else 1
    head_copies = 1 if m % H == 0 else m // math.gcd(H, m)
    heads_per_set = H * head_splits * head_copies // m
    return RouterShape(
        num_routers=m,
        num_experts=n,
        keys_per_expert=max(1, m // n),
        router_width=heads_per_set * d // head_splits,
        head_splits=head_splits,
        head_copies=head_copies,
        heads_per_set=heads_per_set,
    )
