"""Every router under Megatron's padding mask."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_router_upcycling.routers.baselines import LocMoERouter
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import DROPPED
from tests.router_kinds import KINDS
from tests.routers.conftest import BATCH, EXPERTS, SEQUENCE, build, recorded, tokens, transformer_config

pytestmark = pytest.mark.usefixtures("on_cpu")

PADDED = 10  # positions at the end of each sequence


@pytest.fixture(autouse=True)
def loss_scale() -> Iterator[None]:
    """Of the auxiliary losses, which other tests may have left."""
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = before


def made(kind: str, **changes: Any) -> TopKRouter:
    """A router of the kind, as on one of two expert-parallel ranks."""
    top_k = KINDS[kind].top_k
    router = build(
        RouterConfig(router=kind, num_experts=EXPERTS, top_k=top_k),
        transformer_config(moe_router_topk=top_k, **changes),
    )
    if isinstance(router, LocMoERouter):
        router.expert_parallel, router.local_experts = True, slice(0, EXPERTS // 2)
    return router


def gradients(router: TopKRouter, x: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Of the losses that the router adds alone, with respect to its input and parameters."""
    x = x.detach().requires_grad_()
    wanted = [x, *router.parameters()]
    probs, _ = router(x, padding_mask=mask)
    return list(torch.autograd.grad((probs * 0).sum(), wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_loss(kind: str, per_token: bool) -> None:
    """The losses' gradients are those of the batch without the padding, and none of the padding's."""
    router = made(kind)
    router.calculate_per_token_loss = per_token
    x = tokens().detach()
    mask = torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH) >= SEQUENCE - PADDED
    alone = gradients(router, x[:-PADDED], None)
    padded = gradients(router, x, mask)
    assert alone[0].abs().sum() > 0
    torch.testing.assert_close(padded[0][:-PADDED], alone[0], rtol=1e-5, atol=1e-9)
    assert not padded[0][-PADDED:].any()
    torch.testing.assert_close(padded[1:], alone[1:], rtol=1e-5, atol=1e-7)


def test_nothing_but_padding_has_no_locality_loss() -> None:
    router = made("locmoe", moe_router_load_balancing_type="none", moe_z_loss_coeff=None)
    found = gradients(router, tokens(), torch.ones(SEQUENCE, BATCH, dtype=torch.bool))
    assert not any(gradient.any() for gradient in found)


def test_switch_counts_no_padding() -> None:
    router = made("switch", moe_expert_capacity_factor=1.0, moe_token_dispatcher_type="alltoall")
    get_moe_metrics_tracker().metrics.clear()  # type: ignore[attr-defined]
    mask = torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH) >= SEQUENCE - PADDED
    probs, _ = router(tokens(), padding_mask=mask)
    kept = int((probs.unflatten(0, (SEQUENCE, BATCH))[:-PADDED] > 0).sum())
    assert recorded(DROPPED) == pytest.approx(1 - kept / ((SEQUENCE - PADDED) * BATCH))
