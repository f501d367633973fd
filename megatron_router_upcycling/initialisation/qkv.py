"""Megatron's fused query, key and value projection, taken apart (pure torch)."""

from torch import Tensor


def split_qkv(qkv: Tensor, num_heads: int, num_groups: int, dim: int = -2) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of a fused ``linear_qkv``.

    Megatron keeps, group after group, the group's H/G query heads, then its key, then its value. H query
    heads, G query groups (G = H without grouped-query attention), d head size, D hidden size.

    Args:
        qkv: [..., (H + 2G) * d, D] of a weight, or [..., (H + 2G) * d] of a bias, with ``dim=-1``.
        dim: of the fused rows.

    Returns:
        query [..., H*d, D], key [..., G*d, D] and value [..., G*d, D], heads in index order.

    Raises:
        ValueError: the rows are not (H + 2G) heads, or G does not divide H.
    """
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads do not divide into {num_groups} groups")
    queries = num_heads // num_groups
    rows = qkv.shape[dim]
    if rows % (num_heads + 2 * num_groups):
        raise ValueError(f"{rows} fused rows do not hold {num_heads} query heads and {num_groups} groups")
    dim %= qkv.dim()
    head_dim = rows // (num_heads + 2 * num_groups)
    by_group = qkv.unflatten(dim, (num_groups, queries + 2, head_dim))  # [..., G, H/G + 2, d, D]
    query, key, value = by_group.split((queries, 1, 1), dim=dim + 1)
    return query.flatten(dim, dim + 2), key.flatten(dim, dim + 2), value.flatten(dim, dim + 2)
