"""The sizes of a mixture of routers (arXiv 2509.00679, section 5.2.1, table 2)."""

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
    heads_per_set: int  # (part-)heads merged into one query map or key


def router_shape(num_heads: int, head_dim: int, num_routers: int, num_experts: int) -> RouterShape:
    """Apply the paper's rules for m routers over n experts.

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
