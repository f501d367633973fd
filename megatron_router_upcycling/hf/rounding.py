"""A checkpoint's routers as linear gates, and what rounding a gate to another dtype changes.

With sum pooling and one key an expert, eq. 6-8 of arXiv 2509.00679 are one linear gate, which is what a
stock Mixture-of-Experts class holds; otherwise they are the maximum over several. An MLP router is one
linear gate behind a hidden layer.
"""

from dataclasses import dataclass

import torch

from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.hf.architecture import Architecture
from megatron_router_upcycling.hf.name_table import ROUTER
from megatron_router_upcycling.routers.fold import fold, pool_logits

SAMPLE_TOKENS = 1024  # a layer


@dataclass(frozen=True)
class Gates:
    """What a router's linear gates look like: ``num_rows`` of them, ``keys_per_expert`` for each expert."""

    num_rows: int
    keys_per_expert: int
    parameters: dict[str, tuple[int, ...]]  # key -> shape over all layers
    hidden: str | None = None  # the key among them of an MLP's first layer, [L, D, D]

    @classmethod
    def of(cls, router: RouterConfig, model: Architecture) -> "Gates":
        """The gates that ``router`` folds into."""
        L, n, D = model.num_layers, router.num_experts, model.hidden_size
        if router.router in ("linear", "switch"):
            return cls(n, 1, {f"{ROUTER}.weight": (L, n, D)})
        if router.router == "locmoe":
            return cls(n, 1, {})
        if router.router == "mlp":
            hidden = f"{ROUTER}.fc1.weight"
            return cls(n, 1, {hidden: (L, D, D), f"{ROUTER}.fc2.weight": (L, n, D)}, hidden)
        shape = router.shape(model.num_attention_heads, model.kv_channels)
        keys = n * shape.keys_per_expert
        parameters = {
            f"{ROUTER}.query_weight": (L, shape.num_routers, shape.router_width, D),
            f"{ROUTER}.expert_key": (L, keys, shape.router_width),
        }
        num_rows = keys * (shape.num_routers if router.pooling == "max" else 1)
        return cls(num_rows, shape.keys_per_expert, parameters)


def read_gate(checkpoint: Checkpoint, router: RouterConfig, layer: int) -> torch.Tensor:
    """One layer's folded gate, [rows, D] in float32."""
    if router.router == "locmoe":
        return _slice_means(router.num_experts, checkpoint)
    if router.router != "mixture":
        name = "fc2.weight" if router.router == "mlp" else "weight"
        return checkpoint.read_layer(f"{ROUTER}.{name}", layer, bytearray()).float()
    query_weight, expert_key = (
        checkpoint.read_layer(f"{ROUTER}.{parameter}", layer, bytearray())
        for parameter in ("query_weight", "expert_key")
    )
    return fold(query_weight, expert_key, router.pooling, torch.float32)


def _slice_means(num_experts: int, checkpoint: Checkpoint) -> torch.Tensor:
    """LocMoE's gate as a constant matrix: row i averages the i-th of n equal slices of the hidden state."""
    width = int(checkpoint.args.hidden_size) // num_experts
    return torch.eye(num_experts).repeat_interleave(width, dim=1) / width


@dataclass
class Rounding:
    """Of a sample's top-k choices, how many change; sums over layers."""

    choices: int = 0
    by_rounding: int = 0  # the gate alone, everything else in float32
    by_arithmetic: int = 0  # the logits too, as a model in that dtype computes them

    def add(
        self,
        gate: torch.Tensor,
        norm: torch.Tensor,
        router: RouterConfig,
        keys: int,
        layer: int,
        dtype: torch.dtype,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Compare one layer's choices with its gate as it is and in ``dtype``.

        The sample is what a router sees of random hidden states of unit variance: the output of the norm
        before it, in ``dtype``.

        Args:
            gate: [rows, D] in float32.
            norm: [D], the norm's weight.
            hidden: [D, D], an MLP's first layer.
        """
        generator = torch.Generator().manual_seed(layer)
        tokens = torch.randn(SAMPLE_TOKENS, gate.shape[1], generator=generator) * norm.float()
        tokens = tokens.to(dtype)
        n, k = router.num_experts, router.top_k

        def choose(tokens: torch.Tensor, gate: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
            """The choices with weights kept in ``kept``, computed in the dtype of ``tokens``."""
            gate = gate.to(kept).to(tokens.dtype)
            if hidden is not None:
                tokens = torch.nn.functional.gelu(tokens @ hidden.to(kept).to(tokens.dtype).t())
            logits = pool_logits((tokens @ gate.t()).float(), n, keys)
            return torch.zeros(logits.shape).scatter_(1, logits.topk(k, dim=1).indices, 1.0)

        exact = choose(tokens.float(), gate, torch.float32)
        self.choices += SAMPLE_TOKENS * k
        self.by_rounding += int((exact > choose(tokens.float(), gate, dtype)).sum())
        self.by_arithmetic += int((exact > choose(tokens, gate, dtype)).sum())

    def describe(self, dtype: str) -> str:
        if dtype == "float32":
            return "the gates are kept as they were folded, in float32"
        return (
            f"rounding the gates to {dtype} changes {self.by_rounding} of {self.choices} top-k choices of a"
            f" random sample, computing their logits in {dtype} as well changes {self.by_arithmetic}"
        )
