"""Megatron's fused projections, put together: the other direction of what the package takes apart."""

import torch
from torch import Tensor


def merge_qkv(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, num_groups: int, dim: int = -2
) -> Tensor:
    """``linear_qkv``: group after group, its query heads, its key, its value."""
    by_group = [
        part.unflatten(dim, (num_groups, heads, -1))
        for part, heads in ((query, num_heads // num_groups), (key, 1), (value, 1))
    ]
    dim %= query.dim()
    return torch.cat(by_group, dim=dim + 1).flatten(dim, dim + 2)


def merge_gated_fc1(gate: Tensor, up: Tensor, dim: int = -2) -> Tensor:
    """A gated ``linear_fc1`` [..., 2F, D] of gate and up projection, gate first."""
    return torch.cat((gate, up), dim=dim)
