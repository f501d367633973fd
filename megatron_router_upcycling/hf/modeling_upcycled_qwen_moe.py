"""Qwen Mixture-of-Experts whose router is more than one linear gate (transformers 5).

Of arXiv 2509.00679: the maximum over several gates, which is max pooling over routers or several keys an
expert (section 5.2), or an MLP (section 4.3). Written beside a model by megatron-router-upcycling;
everything but the router is transformers' own.
"""

import torch
from torch import nn
from transformers import Qwen2MoeForCausalLM, Qwen3MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


class _PooledRouter(nn.Module):
    """``weight`` [routers * experts * keys, hidden]; an expert's logit is the largest of its gates'.

    With ``hidden.weight`` [hidden, hidden], an MLP's first layer, the gates see its output after GELU.
    """

    def __init__(self, config):
        nn.Module.__init__(self)  # the stock router's makes a gate of another shape
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.keys_per_expert = config.router_keys_per_expert
        self.weight = nn.Parameter(torch.zeros(config.router_gates, config.hidden_size))
        width = config.hidden_size
        self.hidden = nn.Linear(width, width, bias=False) if config.router_has_hidden_layer else None

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, self.weight.shape[1])
        seen = hidden_states.float()
        if self.hidden is not None:
            seen = nn.functional.gelu(nn.functional.linear(seen, self.hidden.weight.float()))
        logits = nn.functional.linear(seen, self.weight.float())
        logits = logits.unflatten(-1, (-1, self.num_experts, self.keys_per_expert)).amax(dim=(-3, -1))
        scores, indices = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return logits, scores.to(hidden_states.dtype), indices


# Of the stock router's kind, so that transformers finds the logits for its auxiliary loss.
class PooledQwen2MoeRouter(_PooledRouter, Qwen2MoeTopKRouter):
    pass


class PooledQwen3MoeRouter(_PooledRouter, Qwen3MoeTopKRouter):
    pass


class UpcycledQwen2MoeForCausalLM(Qwen2MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = PooledQwen2MoeRouter(config)


class UpcycledQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = PooledQwen3MoeRouter(config)
