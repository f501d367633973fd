"""What rounding the folded routers of an export to its dtype changes."""

from collections import Counter
from typing import Any

import torch

from megatron_router_upcycling.hf import name_table
from megatron_router_upcycling.hf.export_job import Export, Gate, stored_name
from megatron_router_upcycling.routers.config import RouterConfig

SAMPLE_TOKENS = 1024  # of a layer, to measure what rounding its gate changes


def measure(job: Export) -> dict[str, int] | None:
    """Of a sample's top-k choices, how many change: ``changed_choices`` of all layers together."""
    if job.router is None:
        return None
    norm = stored_name(job.checkpoint, name_table.NORM_BEFORE_FFN)
    total: Counter[str] = Counter()
    for layer in job.model.expert_layers:
        gain = job.checkpoint.read_layer(norm, layer, bytearray())
        total.update(changed_choices(job.read_gate(layer), gain, job.router, layer, job.dtype))
    return dict(total)


def changed_choices(
    gate: Gate, norm: torch.Tensor, router: RouterConfig, layer: int, dtype: torch.dtype
) -> dict[str, int]:
    """Compare a layer's choices of experts with its gate, in float32, as it is and in ``dtype``.

    The sample is what a router sees of random hidden states of unit variance: the output of the norm before
    it, whose weight is ``norm`` [D], in ``dtype``. Of all ``choices``, those that change with the gate alone
    in ``dtype`` are ``by_rounding``; with the logits too, as a model in that dtype computes them,
    ``by_arithmetic``.
    """
    generator = torch.Generator().manual_seed(layer)
    tokens = (torch.randn(SAMPLE_TOKENS, len(norm), generator=generator) * norm.float()).to(dtype)

    def choose(tokens: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
        """The choices with weights kept in ``kept``, computed in the dtype of ``tokens``."""
        rounded = {name: value.to(kept).to(tokens.dtype) for name, value in gate.items()}
        logits = router.kind.logits(rounded, tokens, router).float()
        return torch.zeros(logits.shape).scatter_(1, logits.topk(router.top_k, dim=1).indices, 1.0)

    exact = choose(tokens.float(), torch.float32)
    return {
        "choices": SAMPLE_TOKENS * router.top_k,
        "by_rounding": int((exact > choose(tokens.float(), dtype)).sum()),
        "by_arithmetic": int((exact > choose(tokens, dtype)).sum()),
    }


def describe(record: dict[str, Any]) -> str:
    """What the record of an export says of rounding, in words."""
    dtype, found = record["dtype"], record["rounding"]
    if dtype == "float32":
        return "the gates are kept as they were folded, in float32"
    return (
        f"routers in {dtype}, not float32: of {found['choices']} choices of an expert for random tokens"
        f" {found['by_rounding']} are others ({found['by_arithmetic']} where logits are computed in {dtype}"
        " too)"
    )
