"""A checkpoint's routers folded into gates, and what rounding a gate to another dtype changes."""

from dataclasses import dataclass

import torch

from megatron_router_upcycling.checkpoint.names import ROUTER
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import Sizes

SAMPLE_TOKENS = 1024  # a layer


def read_gate(
    checkpoint: Checkpoint, router: RouterConfig, sizes: Sizes, layer: int
) -> dict[str, torch.Tensor]:
    """One layer's router as ``Kind.gate`` folds it, in float32; ``layer`` counts those with experts."""
    values = {
        parameter.name: checkpoint.read_layer(f"{ROUTER}.{parameter.name}", layer, bytearray())
        for parameter in router.kind.parameters(router, sizes)
    }
    return router.kind.gate(values, router, sizes.hidden_size, torch.float32)


@dataclass
class Rounding:
    """Of a sample's top-k choices, how many change; sums over layers."""

    choices: int = 0
    by_rounding: int = 0  # the gate alone, everything else in float32
    by_arithmetic: int = 0  # the logits too, as a model in that dtype computes them

    def add(
        self,
        gate: dict[str, torch.Tensor],
        norm: torch.Tensor,
        router: RouterConfig,
        layer: int,
        dtype: torch.dtype,
    ) -> None:
        """Compare one layer's choices with its gate as it is and in ``dtype``.

        The sample is what a router sees of random hidden states of unit variance: the output of the norm
        before it, in ``dtype``.

        Args:
            gate: what ``read_gate`` gives.
            norm: [D], the norm's weight.
        """
        generator = torch.Generator().manual_seed(layer)
        tokens = torch.randn(SAMPLE_TOKENS, len(norm), generator=generator) * norm.float()
        tokens = tokens.to(dtype)

        def choose(tokens: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
            """The choices with weights kept in ``kept``, computed in the dtype of ``tokens``."""
            rounded = {name: value.to(kept).to(tokens.dtype) for name, value in gate.items()}
            logits = router.kind.logits(rounded, tokens, router).float()
            return torch.zeros(logits.shape).scatter_(1, logits.topk(router.top_k, dim=1).indices, 1.0)

        exact = choose(tokens.float(), torch.float32)
        self.choices += SAMPLE_TOKENS * router.top_k
        self.by_rounding += int((exact > choose(tokens.float(), dtype)).sum())
        self.by_arithmetic += int((exact > choose(tokens, dtype)).sum())

    def describe(self, dtype: str) -> str:
        if dtype == "float32":
            return "the gates are kept as they were folded, in float32"
        return (
            f"routers in {dtype}, not float32: of {self.choices} choices of an expert for random tokens"
            f" {self.by_rounding} are others ({self.by_arithmetic} where logits are computed in {dtype} too)"
        )
