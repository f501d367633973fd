"""Routers in a real Megatron of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_router_upcycling.routers.base import builder
from megatron_router_upcycling.routers.config import RouterConfig

HIDDEN, HEADS, HEAD_DIM, EXPERTS = 32, 8, 4, 8
SEQUENCE, BATCH = 24, 2


@pytest.fixture
def on_cpu(megatron: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's router asks CUDA for its device, compiles a function, and keeps metrics and a loss scale."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    get_moe_metrics_tracker().metrics.clear()  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(disable=True):
        yield
    get_moe_metrics_tracker().metrics.clear()  # type: ignore[attr-defined]


def transformer_config(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_channels": HEAD_DIM}
    experts = {"ffn_hidden_size": 4 * HIDDEN, "num_moe_experts": EXPERTS, "moe_router_topk": 2}
    routing = {"moe_router_pre_softmax": True, "moe_router_dtype": "fp32", "add_bias_linear": False}
    losses = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02}
    changes = {"moe_z_loss_coeff": 1e-3} | changes
    return TransformerConfig(**(sizes | experts | routing | losses | changes))


def build(
    router: RouterConfig | None, config: TransformerConfig, seed: int = 0, scale: float = 20
) -> TopKRouter:
    """A router in training mode, with weights large enough to route by; the stock one for None."""
    torch.manual_seed(seed)
    make = TopKRouter if router is None else builder(router)
    made = make(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
    made.set_layer_number(1)
    for parameter in made.parameters():
        parameter.data.mul_(scale)
    return made


def recorded(metric: str) -> float:
    """What layer 1 has recorded among Megatron's metrics."""
    return float(get_moe_metrics_tracker().metrics[metric].values[0])


def tokens(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).to(dtype).requires_grad_()
