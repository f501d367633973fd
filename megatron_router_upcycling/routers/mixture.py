"""The mixture of routers in Megatron's MoE layer (arXiv 2509.00679, eq. 6-9).

The logits are computed folded: with sum pooling and one key an expert, eq. 6-8 are one linear gate,
A = K (sum_j W^j) / sqrt(d'), else a maximum over such gates. The gradients are those of eq. 6-8.

Symbols: m routers, n experts, c keys an expert, d' router width, D hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers.kernels import fold as fold_kernel
from megatron_router_upcycling.layers.kernels import gate as gate_kernel
from megatron_router_upcycling.routers.base import OwnParametersRouter, router_dtype
from megatron_router_upcycling.routers.fold import fold, pool_logits
from megatron_router_upcycling.routers.kinds import keys_per_expert
from megatron_router_upcycling.routers.likeness import gate_cosine, router_agreement

# On the CPU, a product of many tokens with fewer rows than these runs up to twice as fast cut in blocks.
NARROW, BLOCKS = 16, 64


class MixtureRouter(OwnParametersRouter):
    """Parameters ``query_weight`` [m, d', D] and ``expert_key`` [n*c, d'], in ``config.params_dtype``."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., n] of tokens [..., D]; the gate is folded in float32 or better."""
        dtype, options = router_dtype(self.config, input), self.options
        fold_dtype = torch.promote_types(dtype, torch.float32)
        parts = self.query_weight, self.expert_key
        if options.pooling == "sum" and fold_kernel.usable(*parts, fold_dtype):
            gate = fold_kernel.fold_sum(*parts)
        else:
            gate = fold(*parts, options.pooling, fold_dtype)
        tokens = input.reshape(-1, input.shape[-1])
        if gate_kernel.usable(tokens, gate, dtype):
            logits = gate_kernel.gate_logits(tokens, gate).view(*input.shape[:-1], -1)
        else:
            logits = _GateProduct.apply(input, gate, dtype)
        logits = pool_logits(logits, options.num_experts, keys_per_expert(options))
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def own_measures(self, tokens: Tensor | None) -> dict[str, float]:
        """How similar the routers are; ``tokens`` [T, D] are a sample of their inputs."""
        if len(self.query_weight) == 1:
            return {}
        parts = self.query_weight, self.expert_key
        found = {"gate_cosine": gate_cosine(*parts)}
        if tokens is not None:
            found["router_agreement"] = router_agreement(tokens, *parts, self.options)
        return found


class _GateProduct(torch.autograd.Function):
    """input [..., D] times gate [rows, D], in the router's dtype; saves the input in its own dtype.

    Transformer Engine's GEMM in Megatron's ``router_gating_linear`` refuses a float32 gate beside bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, gate: Tensor, router_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(input, gate)
        ctx.router_dtype = router_dtype
        tokens = input.reshape(-1, input.shape[-1])
        logits = torch.mm(tokens.to(router_dtype), gate.to(router_dtype).t())
        return logits.view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, Tensor, None]:
        input, gate = ctx.saved_tensors
        rows, hidden = gate.shape
        narrow = rows < NARROW and input.device.type == "cpu"
        blocks = math.gcd(input.numel() // hidden, BLOCKS) if narrow else 1
        tokens = input.reshape(blocks, -1, hidden).to(ctx.router_dtype)
        grad_logits = grad_logits.reshape(blocks, -1, rows)
        grad_input = torch.bmm(grad_logits, gate.to(ctx.router_dtype).expand(blocks, -1, -1))
        grad_gate = torch.bmm(grad_logits.transpose(1, 2), tokens).sum(dim=0)
        return grad_input.to(input.dtype).view_as(input), grad_gate.to(gate.dtype), None
