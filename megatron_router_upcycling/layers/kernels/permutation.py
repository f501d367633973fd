"""Permute tokens into rows sorted by expert, and back, where all experts are on this rank.

Every shape is known in advance: nothing is copied to the host. Both directions gather, without atomic
additions, so results do not change from run to run.

Symbols: T tokens, n experts, k experts a token, R = T * k rows, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

TOKENS = 128  # a program's


class Places(NamedTuple):
    row_of: Tensor  # int32 [T, k]: a token's rows in the order of its experts
    token_of: Tensor  # int32 [R]: a row's token
    counts: Tensor  # int32 [n]: an expert's rows
    routing_map: Tensor  # bool [T, n], as the router gave it


def find_places(routing_map: Tensor, top_k: int) -> Places:
    """Sort by expert, and within an expert by token: ``routing_map`` is bool [T, n], ``top_k`` True a row."""
    T, n = routing_map.shape
    routing_map = routing_map.contiguous()
    if not kernels.usable(routing_map):
        return _find_places_plainly(routing_map, top_k)
    blocks, width = kernels.blocks(T, TOKENS), kernels.block_size(n)
    shapes = (blocks, n), (T, top_k), (T * top_k,), (n,)
    partial, row_of, token_of, counts = (routing_map.new_empty(s, dtype=torch.int32) for s in shapes)
    as_bytes = routing_map.view(torch.uint8)
    _rows_count[(blocks,)](as_bytes, partial, T, n, TOKENS, width)
    tensors = as_bytes, partial, row_of, token_of, counts
    _rows_place[(blocks,)](*tensors, T, n, blocks, top_k, TOKENS, width, 32)
    return Places(row_of, token_of, counts, routing_map)


def _find_places_plainly(routing_map: Tensor, top_k: int) -> Places:
    T, n = routing_map.shape
    row = (routing_map.t().reshape(-1).cumsum(0) - 1).view(n, T).t()  # where the map is True
    row_of = _of_chosen(row, routing_map, top_k)
    tokens = torch.arange(T, dtype=torch.int32, device=row.device).repeat_interleave(top_k)
    token_of = torch.empty_like(tokens).scatter_(0, row_of.reshape(-1), tokens)
    return Places(row_of.int(), token_of, routing_map.sum(0, dtype=torch.int32), routing_map)


def _of_chosen(values: Tensor, routing_map: Tensor, top_k: int) -> Tensor:
    """The ``values`` [T, n] at the chosen experts, in their order: [T, k]; differentiable."""
    slot = torch.where(routing_map, routing_map.cumsum(1) - 1, top_k)
    return values.new_zeros(len(values), top_k + 1).scatter(1, slot, values)[:, :top_k]


def permute(hidden: Tensor, probs: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """Tokens [T, D] and probabilities [T, n] as rows sorted by expert: [R, D] and [R]."""
    return _Permute.apply(hidden, probs, places)


def combine(rows: Tensor, places: Places) -> Tensor:
    """The sum of each token's rows, added up in float32: [R, D] to [T, D]."""
    return _Combine.apply(rows, places)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probs: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        ctx.places = places
        return hidden.index_select(0, places.token_of), _permuted_probs(probs, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        return sum_of_rows(grad_rows, ctx.places), _spread_probs(grad_probs, ctx.places), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return sum_of_rows(rows, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.places.token_of), None


def sum_of_rows(rows: Tensor, places: Places) -> Tensor:
    T, top_k = places.row_of.shape
    if not kernels.usable(rows):
        chosen = rows.index_select(0, places.row_of.reshape(-1)).view(T, top_k, -1)
        return chosen.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)
    rows = rows.contiguous()
    width = rows.shape[1]
    output = rows.new_empty(T, width)
    _rows_sum[(T,)](rows, places.row_of, output, width, top_k, kernels.block_size(width, 2048))
    return output


def _permuted_probs(probs: Tensor, places: Places) -> Tensor:
    T, top_k = places.row_of.shape
    permuted = probs.new_empty(T * top_k)
    if kernels.usable(probs):
        _move_probs(probs.contiguous(), permuted, places, to_rows=True)
        return permuted
    chosen = _of_chosen(probs, places.routing_map, top_k)
    return permuted.scatter_(0, places.row_of.reshape(-1).long(), chosen.reshape(-1))


def _spread_probs(grad: Tensor, places: Places) -> Tensor:
    if kernels.usable(grad):
        spread = grad.new_empty(places.routing_map.shape)
        _move_probs(spread, grad.contiguous(), places, to_rows=False)
        return spread
    chosen = grad.index_select(0, places.row_of.reshape(-1)).view(places.row_of.shape)
    slot = (places.routing_map.cumsum(1) - 1).clamp(min=0)
    return torch.where(places.routing_map, chosen.gather(1, slot), 0)


def _move_probs(dense: Tensor, rows: Tensor, places: Places, to_rows: bool) -> None:
    """Copy between ``dense`` [T, n] and ``rows`` [R]."""
    (T, n), top_k = dense.shape, places.row_of.shape[1]
    tensors = dense, places.routing_map.view(torch.uint8), places.row_of, rows
    constants = top_k, to_rows, TOKENS, kernels.block_size(n)
    _rows_probs[(kernels.blocks(T, TOKENS),)](*tensors, T, n, *constants)


@triton.jit
def _chosen(routing_map, T, n, TOKENS: tl.constexpr, N: tl.constexpr):
    """The routing map of this program's tokens, int32 [TOKENS, N], and each entry's place in [T, n]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N)
    place = token[:, None] * n + expert[None, :]
    inside = (token[:, None] < T) & (expert[None, :] < n)
    return tl.load(routing_map + place, mask=inside, other=0).to(tl.int32), place, inside, token, expert


@triton.jit
def _rows_count(routing_map, partial, T, n, TOKENS: tl.constexpr, N: tl.constexpr):
    chosen, _, _, _, expert = _chosen(routing_map, T, n, TOKENS, N)
    tl.store(partial + tl.program_id(0) * n + expert, tl.sum(chosen, 0), mask=expert < n)


@triton.jit
def _rows_place(
    routing_map, partial, row_of, token_of, counts, T, n, blocks,
    K: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chosen, _, _, token, expert = _chosen(routing_map, T, n, TOKENS, N)
    program = tl.program_id(0)
    total = tl.zeros((N,), tl.int32)
    before = tl.zeros((N,), tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        inside = (block[:, None] < blocks) & (expert[None, :] < n)
        part = tl.load(partial + block[:, None] * n + expert[None, :], mask=inside, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(block[:, None] < program, part, 0), 0)
    first = tl.cumsum(total, 0) - total + before
    row = first[None, :] + tl.cumsum(chosen, 0) - 1
    slot = tl.cumsum(chosen, 1) - 1
    tl.store(row_of + token[:, None] * K + slot, row, mask=chosen > 0)
    tl.store(token_of + row, tl.broadcast_to(token[:, None], (TOKENS, N)), mask=chosen > 0)
    tl.store(counts + expert, total, mask=(expert < n) & (program == 0))


@triton.jit
def _rows_probs(
    dense, routing_map, row_of, rows, T, n,
    K: tl.constexpr, TO_ROWS: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chosen, place, inside, token, _ = _chosen(routing_map, T, n, TOKENS, N)
    slot = tl.cumsum(chosen, 1) - 1
    row = tl.load(row_of + token[:, None] * K + slot, mask=chosen > 0, other=0)
    if TO_ROWS:
        tl.store(rows + row, tl.load(dense + place, mask=chosen > 0, other=0.0), mask=chosen > 0)
    else:
        tl.store(dense + place, tl.load(rows + row, mask=chosen > 0, other=0.0), mask=inside)


@triton.jit
def _rows_sum(rows, row_of, output, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros((BLOCK,), tl.float32)
        for slot in tl.static_range(K):
            row = tl.load(row_of + token * K + slot).to(tl.int64)
            total += tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + token * width + column, total.to(output.dtype.element_ty), mask=inside)
