"""Megatron's fused attention and FFN projections, taken apart and put together again.

Pure torch. Every function takes weights and biases alike, with any leading dimensions (a stack of
layers, say): ``dim`` names the dimension of the fused rows, -2 for a weight [..., rows, D] and -1 for a
bias [..., rows]. Splitting and merging are exact inverses, bit for bit.

Symbols: H query heads, G query groups (G = H without grouped-query attention), d head size, D hidden
size, F FFN size.
"""

import torch
from torch import Tensor


def split_qkv(qkv: Tensor, num_heads: int, num_groups: int, dim: int = -2) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of a fused ``linear_qkv``.

    Megatron keeps, group after group, the group's H/G query heads, then its key, then its value.

    Args:
        qkv: [..., (H + 2G) * d, D], or [..., (H + 2G) * d] with ``dim=-1``.

    Returns:
        query [..., H*d, D], key [..., G*d, D] and value [..., G*d, D], heads in index order.

    Raises:
        ValueError: the rows are not (H + 2G) heads, or G does not divide H.
    """
    queries = _queries_per_group(num_heads, num_groups)
    rows = qkv.shape[dim]
    if rows % (num_heads + 2 * num_groups):
        raise ValueError(f"{rows} fused rows do not hold {num_heads} query heads and {num_groups} groups")
    dim %= qkv.dim()
    head_dim = rows // (num_heads + 2 * num_groups)
    by_group = qkv.unflatten(dim, (num_groups, queries + 2, head_dim))  # [..., G, H/G + 2, d, D]
    query, key, value = by_group.split((queries, 1, 1), dim=dim + 1)
    return query.flatten(dim, dim + 2), key.flatten(dim, dim + 2), value.flatten(dim, dim + 2)


def merge_qkv(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, num_groups: int, dim: int = -2
) -> Tensor:
    """The inverse of ``split_qkv``.

    Raises:
        ValueError: the rows are not whole heads, or G does not divide H.
    """
    queries = _queries_per_group(num_heads, num_groups)
    if query.shape[dim] % num_heads:
        raise ValueError(f"{query.shape[dim]} query rows do not hold {num_heads} heads")
    dim %= query.dim()
    head_dim = query.shape[dim] // num_heads
    by_group = [
        part.unflatten(dim, (num_groups, heads, head_dim))
        for part, heads in ((query, queries), (key, 1), (value, 1))
    ]
    return torch.cat(by_group, dim=dim + 1).flatten(dim, dim + 2)


def split_gated_fc1(fc1: Tensor, dim: int = -2) -> tuple[Tensor, Tensor]:
    """Gate [..., F, D] and up [..., F, D] of a gated ``linear_fc1`` [..., 2F, D]: gate first, then up.

    Raises:
        ValueError: an odd number of rows.
    """
    if fc1.shape[dim] % 2:
        raise ValueError(f"{fc1.shape[dim]} rows are not a gate and an up projection of one size")
    gate, up = fc1.chunk(2, dim=dim)
    return gate, up


def merge_gated_fc1(gate: Tensor, up: Tensor, dim: int = -2) -> Tensor:
    """The inverse of ``split_gated_fc1``."""
    return torch.cat((gate, up), dim=dim)


def _queries_per_group(num_heads: int, num_groups: int) -> int:
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads do not divide into {num_groups} groups")
    return num_heads // num_groups
