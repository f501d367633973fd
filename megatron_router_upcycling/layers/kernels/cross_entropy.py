"""Cross entropy over a whole vocabulary: logits are read once forward, and read and written once backward.

The gradient overwrites the logits, so that no second tensor of their size is ever held.

Symbols: T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import tl, triton


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] for each token: float32 [T]. The backward pass overwrites the logits.

    ``logits`` are [T, V] in any float dtype, ``labels`` int64 [T].
    """
    if kernels.usable(logits, labels):
        return _CrossEntropy.apply(logits, labels)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        T, V = logits.shape
        losses = logits.new_empty(T, dtype=torch.float32)
        log_sums = torch.empty_like(losses)
        _loss[(T,)](logits, labels, losses, log_sums, V, kernels.block_size(V, 8192), num_warps=16)
        ctx.save_for_backward(logits, labels, log_sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, log_sums = ctx.saved_tensors
        T, V = logits.shape
        block = kernels.block_size(V, 4096)
        grid = (T, kernels.blocks(V, block))
        _loss_grad[grid](logits, labels, log_sums, grad.contiguous(), V, BLOCK=block, num_warps=8)
        return logits, None


@triton.jit
def _loss(logits, labels, losses, log_sums, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - finite) + tl.exp(x - finite)
        largest = higher
    top = tl.max(largest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    label = tl.load(labels + token)
    own = tl.load(logits + token * V + label).to(tl.float32)
    tl.store(losses + token, log_sum - own)
    tl.store(log_sums + token, log_sum)


@triton.jit
def _loss_grad(logits, labels, log_sums, grad, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + token * V + column
    x = tl.load(place, mask=column < V, other=0.0).to(tl.float32)
    above = tl.load(grad + token)
    prob = tl.exp(x - tl.load(log_sums + token))
    value = tl.where(column == tl.load(labels + token), prob - 1.0, prob) * above
    tl.store(place, value.to(logits.dtype.element_ty), mask=column < V)
