"""The mixture of routers in Megatron's MoE layer (arXiv 2509.00679, eq. 6-9).

A ``TopKRouter`` with other logits: all that Megatron does after them (z-loss, softmax, top-k, auxiliary
losses, token dropping, expert bias, replay) is inherited.

The logits are computed folded: with sum pooling and one key an expert, eq. 6-8 are one linear gate,
A = K (sum_j W^j) / sqrt(d'), made from the weights alone once a forward pass; with max pooling or more
keys they are a maximum over such gates. The gradients are those of eq. 6-8.

Symbols: m routers, n experts, c keys an expert, d' router width, D hidden size.
"""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.routers.base import OwnParametersRouter, router_dtype
from megatron_router_upcycling.routers.fold import fold, pool_logits

# On the CPU, a product of many tokens with fewer rows than these runs up to twice as fast cut in blocks.
NARROW, BLOCKS = 16, 64


class MixtureRouter(OwnParametersRouter):
    """Parameters ``query_weight`` [m, d', D] and ``expert_key`` [n*c, d'], in ``config.params_dtype``.

    Replicated over all parallel groups, as the stock router's ``weight`` is, which does not exist here.
    From scratch both are drawn with ``config.init_method``.

    Raises:
        UserError: m, n and the model's attention heads do not fit (``RouterConfig.shape``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        router: RouterConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert router.num_experts == config.num_moe_experts
        shape = router.shape(config.num_attention_heads, config.kv_channels)
        self.pooling = router.pooling
        self.keys_per_expert = shape.keys_per_expert
        num_keys = router.num_experts * shape.keys_per_expert
        # In place of the stock gate, so that no state dict, DDP buffer or optimizer ever sees that.
        self.register_parameter("weight", None)
        self.query_weight = torch.nn.Parameter(
            torch.empty((shape.num_routers, shape.router_width, config.hidden_size), dtype=torch.float32)
        )
        self.expert_key = torch.nn.Parameter(torch.empty((num_keys, shape.router_width), dtype=torch.float32))
        self.reset_parameters()

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., n] of tokens [..., D], in ``moe_router_dtype`` (default: the input's dtype).

        The gate is folded in float32 or better whatever the parameters' dtype.
        """
        dtype = router_dtype(self.config, input)
        fold_dtype = torch.promote_types(dtype, torch.float32)
        gate = fold(self.query_weight, self.expert_key, self.pooling, fold_dtype)
        logits = _GateProduct.apply(input, gate, dtype)
        logits = pool_logits(logits, self.config.num_moe_experts, self.keys_per_expert)
        return logits if self.bias is None else logits + self.bias.to(dtype)


class _GateProduct(torch.autograd.Function):
    """input [..., D] times gate [rows, D], in the router's dtype; only the input as it came is kept.

    The arithmetic of Megatron's ``router_gating_linear`` without Transformer Engine. With it, that
    function's GEMM refuses a float32 gate beside a bfloat16 input, and rounds float32 to TF32.
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
