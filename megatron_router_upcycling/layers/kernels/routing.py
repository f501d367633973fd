"""From logits to the chosen experts and their weights, with the sums over tokens that anybody asks for.

That is the routing statistics, the load-balancing loss and the z-loss, which would each need a dozen small
kernels: here they come with the routing, and one kernel makes both losses of them.

Symbols: T tokens, n experts, k experts a token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton
from megatron_router_upcycling.layers.statistics import SUMS, routing_sums

TOKENS = 64  # a program's
MOST_EXPERTS = 256
STATISTICS = len(SUMS)  # that come first in a routing's sums, before the loads


class Routing(NamedTuple):
    probs: Tensor  # [T, n]: the weights of the chosen experts, 0 elsewhere
    routing_map: Tensor  # bool [T, n]: the chosen experts
    # float32 [2n + 6], over tokens: ``routing_sums``, without gradients; then the n scores, of the
    # load-balancing loss, and logsumexp(logits)^2, of the z-loss.
    sums: Tensor

    @property
    def statistics(self) -> Tensor:
        """The ``routing_sums``, float32 [5 + n]."""
        return self.sums[: STATISTICS + self.probs.shape[1]].detach()

    @property
    def load(self) -> Tensor:
        """How many tokens chose each expert, float32 [n]."""
        return self.statistics[STATISTICS:]


class Loss(NamedTuple):
    """An auxiliary loss, linear in some of ``Routing.sums``."""

    slope: float = 0.0  # of the loss
    logged: float = 0.0  # of the value in the log
    log: Tensor | None = None  # float32 []: that value is added here


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
    statistics = routing_sums(scores.detach(), probs.detach(), routing_map, top_k)
    square_sum = torch.logsumexp(logits, dim=-1).square().sum()
    return Routing(probs, routing_map, torch.cat((statistics, scores.sum(0), square_sum[None])))


def losses(sums: Tensor, load: Tensor, balance: Loss, z: Loss) -> Tensor:
    """Add both losses to their logs; their gradient by ``sums``, float32 [2n + 6].

    The load-balancing loss is ``balance.slope`` times the sum over experts of ``load`` [n] times score; the
    z-loss is ``z.slope`` times the last of the sums.
    """
    n = len(load)
    if kernels.usable(sums, load):
        slopes = torch.empty_like(sums)
        numbers = balance.slope, balance.logged, z.slope, z.logged
        width = kernels.block_size(len(sums))
        _losses[(1,)](sums, load, slopes, balance.log, z.log, *numbers, n, STATISTICS, width)
        return slopes
    if balance.log is not None:
        balance.log.add_((load * sums[STATISTICS + n : -1]).sum() * balance.logged)
    if z.log is not None:
        z.log.add_(sums[-1] * z.logged)
    return torch.cat(
        (torch.zeros_like(sums[: STATISTICS + n]), load * balance.slope, sums.new_tensor([z.slope]))
    )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, pre_softmax: bool) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        T, n = logits.shape
        programs = kernels.blocks(T, TOKENS)
        probs = torch.empty_like(logits)
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        sums = logits.new_empty(programs, STATISTICS + 2 * n + 1)
        tensors = logits, probs, routing_map.view(torch.uint8), sums
        _routing[(programs,)](*tensors, T, n, STATISTICS, top_k, pre_softmax, TOKENS, kernels.block_size(n))
        ctx.pre_softmax = pre_softmax
        ctx.save_for_backward(logits, routing_map)
        ctx.mark_non_differentiable(routing_map)
        ctx.set_materialize_grads(False)
        return probs, routing_map, sums.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs: Any, _: Any, grad_sums: Any) -> tuple[Any, ...]:
        logits, routing_map = ctx.saved_tensors
        T, n = logits.shape
        grad_logits = torch.empty_like(logits)
        if grad_sums is None:
            grad_sums = logits.new_zeros(STATISTICS + 2 * n + 1)
        grads = grad_probs.contiguous(), grad_sums.contiguous()
        tensors = logits, routing_map.view(torch.uint8), *grads, grad_logits
        constants = STATISTICS, ctx.pre_softmax, TOKENS, kernels.block_size(n)
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
    logits, probs, routing_map, sums, T, n, STATISTICS: tl.constexpr,
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
    known = token < T
    own = sums + program * (STATISTICS + 2 * n + 1)
    # The logarithm of a score, which may be 0 itself.
    minus_log = tl.where(valid, log_sum[:, None] - x, 0.0)
    tl.store(own, tl.sum(known.to(tl.float32), 0))
    tl.store(own + 1, tl.sum(tl.sum(tl.where(valid, scores * minus_log, 0.0), 1), 0))
    tl.store(own + 2, tl.sum(tl.where(known, tl.max(scores, 1), 0.0), 0))
    tl.store(own + 3, tl.sum(tl.sum(tl.where(valid, weight, 0.0), 1), 0))
    tl.store(own + 4, 0.0)
    load = tl.sum(tl.where(valid, chosen, 0).to(tl.float32), 0)
    tl.store(own + STATISTICS + expert, load, mask=expert < n)
    total = tl.sum(tl.where(valid, scores, 0.0), 0)
    tl.store(own + STATISTICS + n + expert, total, mask=expert < n)
    tl.store(own + STATISTICS + 2 * n, tl.sum(tl.where(known, log_sum * log_sum, 0.0), 0))


@triton.jit
def _routing_grad(
    logits, routing_map, grad_probs, grad_sums, grad_logits, T, n,
    STATISTICS: tl.constexpr, PRE_SOFTMAX: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr,
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
    of_sums = tl.load(grad_sums + STATISTICS + n + expert, mask=expert < n, other=0.0)
    of_scores = of_sums[None, :] + tl.zeros((TOKENS, N), tl.float32)
    if PRE_SOFTMAX:
        of_scores += of_probs
    grad = scores * (of_scores - tl.sum(scores * of_scores, 1)[:, None])
    if not PRE_SOFTMAX:
        weight, _unused = _softmax(x, chosen | ((token[:, None] >= T) & (expert[None, :] == 0)))
        grad += weight * (of_probs - tl.sum(weight * of_probs, 1)[:, None])
    grad += scores * (2 * log_sum * tl.load(grad_sums + STATISTICS + 2 * n))[:, None]
    tl.store(grad_logits + place, grad, mask=valid)


@triton.jit
def _losses(
    sums, load, slopes, balance_log, z_log, balance, balance_logged, z, z_logged, n,
    STATISTICS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, WIDTH)
    expert = place - STATISTICS - n
    is_score = (expert >= 0) & (expert < n)
    counted = tl.load(load + expert, mask=is_score, other=0.0)
    slope = tl.where(expert == n, z, counted * balance)
    tl.store(slopes + place, slope, mask=place < STATISTICS + 2 * n + 1)
    if balance_log is not None:
        score = tl.load(sums + place, mask=is_score, other=0.0)
        tl.store(balance_log, tl.load(balance_log) + tl.sum(counted * score, 0) * balance_logged)
    if z_log is not None:
        tl.store(z_log, tl.load(z_log) + tl.load(sums + STATISTICS + 2 * n) * z_logged)
