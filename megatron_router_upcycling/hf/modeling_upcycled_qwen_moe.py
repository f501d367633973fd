"""Qwen Mixture-of-Experts whose router is not one linear gate (transformers 5).

The router is one of arXiv 2509.00679: the maximum over several gates, for max pooling over routers or several
keys an expert (section 5.2), or an MLP (section 4.3). megatron-router-upcycling writes this file next to a
model and adds the router's logits at the end; everything but the router is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers import Qwen2MoeForCausalLM, Qwen3MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

# Kind of router -> (its tensors by name, hidden states [..., D], its options) -> logits [..., n].
LOGITS: dict[str, Callable] = {}


class _Router(nn.Module):
    """A router of the kind and the options in ``config.upcycled_router``.

    ``config.upcycled_gate`` gives the names and shapes of its tensors. Logits are computed in float32.
    """

    def __init__(self, config):
        nn.Module.__init__(self)  # the stock constructor makes a gate of another shape
        self.options = SimpleNamespace(**config.upcycled_router)
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.names = list(config.upcycled_gate)
        for place, shape in config.upcycled_gate.items():
            *modules, name = place.split(".")
            owner = self
            for module in modules:
                if not hasattr(owner, module):
                    owner.add_module(module, nn.Module())
                owner = getattr(owner, module)
            owner.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate = {name: self.get_parameter(name).float() for name in self.names}
        logits = LOGITS[self.options.router](gate, hidden_states.float(), self.options)
        scores, indices = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return logits, scores.to(hidden_states.dtype), indices


# Subclasses of the stock routers, so that transformers finds the logits for its auxiliary loss.
class UpcycledQwen2MoeRouter(_Router, Qwen2MoeTopKRouter):
    pass


class UpcycledQwen3MoeRouter(_Router, Qwen3MoeTopKRouter):
    pass


class UpcycledQwen2MoeForCausalLM(Qwen2MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate = UpcycledQwen2MoeRouter(config)


class UpcycledQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate = UpcycledQwen3MoeRouter(config)
