"""What Megatron computes of a layer's FFN or experts, token by token, and its fused projections."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class MegatronFFN(torch.nn.Module):
    """Of ``layer``, stacked or under keys of its own; ``args``: Megatron's, and ``pooling`` of a mixture."""

    def __init__(self, tensors: dict[str, Tensor], layer: int, args: Any) -> None:
        super().__init__()
        self.args = args
        self.values = {}
        for key, value in tensors.items():
            own = f"decoder.layers.{layer}.mlp."
            if key.startswith(own):
                self.values[key.removeprefix(own)] = value
            elif key.startswith("decoder.layers.mlp."):
                self.values[key.removeprefix("decoder.layers.mlp.")] = value[layer]

    def ffn(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        fc1, fc2 = (self.values[f"{name}linear_fc{number}.weight"] for number in (1, 2))
        if expert is not None:
            fc1, fc2 = fc1[expert], fc2[expert]
        gate, up = (x @ fc1.t()).chunk(2, -1)
        return (silu(gate) * up) @ fc2.t()

    def logits(self, x: Tensor) -> Tensor:
        if "router.weight" in self.values:
            return x @ self.values["router.weight"].t()
        query, key = self.values["router.query_weight"], self.values["router.expert_key"]
        scores = torch.einsum("mrd,d,er->me", query, x, key) / query.shape[1] ** 0.5
        pooled = scores.amax(0) if len(query) == 4 and self.args.pooling == "max" else scores.sum(0)
        return pooled.unflatten(0, (self.args.num_experts, -1)).amax(-1)

    def token(self, x: Tensor) -> Tensor:
        if "linear_fc1.weight" in self.values:
            return self.ffn(x, "")
        logits, k = self.logits(x), self.args.moe_router_topk
        chosen = logits.topk(k).indices
        weights = logits.softmax(0)[chosen] if self.args.moe_router_pre_softmax else logits[chosen].softmax(0)
        weights = weights * (self.args.moe_router_topk_scaling_factor or 1)
        output = sum(
            weight * self.ffn(x, "experts.experts.", int(expert))
            for weight, expert in zip(weights, chosen, strict=True)
        )
        if self.args.moe_shared_expert_intermediate_size:
            shared = self.ffn(x, "shared_experts.")
            if getattr(self.args, "moe_shared_expert_gate", False):
                shared = shared * (x @ self.values["shared_experts.gate_weight"][0]).sigmoid()
            output = output + shared
        return output

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.token(x) for x in hidden.flatten(0, 1)]).view(hidden.shape)


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
