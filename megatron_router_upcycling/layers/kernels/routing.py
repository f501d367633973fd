"""From logits to the chosen experts and their weights, with the sums that both auxiliary losses need.

Symbols: T tokens, n experts, k experts a token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton

TOKENS = 64  # a program's
MOST_EXPERTS = 256


class Routing(NamedTuple):
    probs: Tensor  # [T, n]: the weights of the chosen experts, 0 elsewhere
    routing_map: Tensor  # bool [T, n]: the chosen experts
    score_sums: Tensor  # float32 [n]: the softmax summed over tokens, of the load-balancing loss
    square_sum: Tensor  # float32 []: the sum over tokens of logsumexp(logits)^2, of the z-loss


def usable(logits: Tensor) -> bool:
    return kernels.usable(logits) and logits.dtype is torch.float32 and logits.shape[1] <= MOST_EXPERTS


def route(logits: Tensor, top_k: int, pre_softmax: bool) -> Routing:
    """Softmax over all experts, then its top k (the paper's order), or softmax over the top k logits.

    ``logits`` are float32 [T, n]. Among equal ones the first experts are chosen.
    """
    if usable(logits):
        return Routing(*_Route.apply(logits, top_k, pre_softmax))
    return plain(logits, top_k, pre_softmax)


def plain(logits: Tensor, top_k: int, pre_softmax: bool) -> Routing:
    scores = torch.softmax(logits, dim=-1)
    # A stable sort, so that equal logits are taken in the experts' order.
    chosen = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    if pre_softmax:
        probs = torch.where(routing_map, scores, 0)
    else:
        probs = torch.softmax(logits.masked_fill(~routing_map, float("-inf")), dim=-1)
    square_sum = torch.logsumexp(logits, dim=-1).square().sum()
    return Routing(probs, routing_map, scores.sum(0), square_sum)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, pre_softmax: bool) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        T, n = logits.shape
        programs = kernels.blocks(T, TOKENS)
        probs = torch.empty_like(logits)
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        sums = logits.new_empty(programs, n + 1)
        tensors = logits, probs, routing_map.view(torch.uint8), sums
        _routing[(programs,)](*tensors, T, n, top_k, pre_softmax, TOKENS, kernels.block_size(n))
        total = sums.sum(0)
        ctx.pre_softmax = pre_softmax
        ctx.save_for_backward(logits, routing_map)
        ctx.mark_non_differentiable(routing_map)
        return probs, routing_map, total[:n], total[n]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs: Any, _: Any, grad_sums: Any, grad_square: Any) -> tuple[Any, ...]:
        logits, routing_map = ctx.saved_tensors
        T, n = logits.shape
        grad_logits = torch.empty_like(logits)
        grads = grad_probs.contiguous(), grad_sums.contiguous(), grad_square
        tensors = logits, routing_map.view(torch.uint8), *grads, grad_logits
        constants = ctx.pre_softmax, TOKENS, kernels.block_size(n)
        _routing_grad[(kernels.blocks(T, TOKENS),)](*tensors, T, n, *constants)
        return grad_logits, None, None


@triton.jit
def _softmax(logits, inside):
    largest = tl.max(tl.where(inside, logits, float("-inf")), 1)
    power = tl.where(inside, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(power, 1)
    return power / total[:, None], largest + tl.log(total)


@triton.jit
def _routing(
    logits, probs, routing_map, sums, T, n,
    K: tl.constexpr, PRE_SOFTMAX: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = program * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N)
    place = token[:, None] * n + expert[None, :]
    valid = (token[:, None] < T) & (expert[None, :] < n)
    is_expert = (token[:, None] < T + TOKENS) & (expert[None, :] < n)
    x = tl.load(logits + place, mask=valid, other=0.0)
    scores, log_sum = _softmax(x, is_expert)
    rest = tl.where(is_expert, x, float("-inf"))
    chosen = tl.zeros((TOKENS, N), tl.int32)
    for _ in tl.static_range(K):
        largest = tl.max(rest, 1)
        is_largest = (rest == largest[:, None]) & (chosen == 0) & is_expert
        first = tl.min(tl.where(is_largest, expert[None, :], N), 1)
        now = expert[None, :] == first[:, None]
        chosen = tl.where(now, 1, chosen)
        rest = tl.where(now, float("-inf"), rest)
    if PRE_SOFTMAX:
        weight = tl.where(chosen > 0, scores, 0.0)
    else:
        weight, _unused = _softmax(x, chosen > 0)
    tl.store(probs + place, weight, mask=valid)
    tl.store(routing_map + place, chosen.to(tl.uint8), mask=valid)
    tl.store(sums + program * (n + 1) + expert, tl.sum(tl.where(valid, scores, 0.0), 0), mask=expert < n)
    square = tl.sum(tl.where(token < T, log_sum * log_sum, 0.0), 0)
    tl.store(sums + program * (n + 1) + n, square)


@triton.jit
def _routing_grad(
    logits, routing_map, grad_probs, grad_sums, grad_square, grad_logits, T, n,
    PRE_SOFTMAX: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N)
    place = token[:, None] * n + expert[None, :]
    valid = (token[:, None] < T) & (expert[None, :] < n)
    is_expert = (token[:, None] < T + TOKENS) & (expert[None, :] < n)
    x = tl.load(logits + place, mask=valid, other=0.0)
    scores, log_sum = _softmax(x, is_expert)
    chosen = tl.load(routing_map + place, mask=valid, other=0).to(tl.int32) > 0
    of_probs = tl.where(chosen, tl.load(grad_probs + place, mask=valid, other=0.0), 0.0)
    of_sums = tl.load(grad_sums + expert, mask=expert < n, other=0.0)
    of_scores = of_sums[None, :] + tl.zeros((TOKENS, N), tl.float32)
    if PRE_SOFTMAX:
        of_scores += of_probs
    grad = scores * (of_scores - tl.sum(scores * of_scores, 1)[:, None])
    if not PRE_SOFTMAX:
        weight, _unused = _softmax(x, chosen | ((token[:, None] >= T) & (expert[None, :] == 0)))
        grad += weight * (of_probs - tl.sum(weight * of_probs, 1)[:, None])
    grad += scores * (2 * log_sum * tl.load(grad_square))[:, None]
    tl.store(grad_logits + place, grad, mask=valid)
