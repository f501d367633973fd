"""What the baselines' routers add to the routing, and every router under Megatron's padding mask."""

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.baselines import LocMoERouter, locality_loss
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import DROPPED, LOCAL
from megatron_router_upcycling.training.layer_spec import report_also
from tests.router_kinds import KINDS
from tests.routers.conftest import BATCH, EXPERTS, SEQUENCE, build, recorded, tokens, transformer_config

pytestmark = pytest.mark.usefixtures("on_cpu")

CAPACITY = {"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"}
PADDED = 10  # positions at the end of each sequence
MASK = torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH) >= SEQUENCE - PADDED


def test_locality_loss_is_the_log_of_the_mass_that_stays() -> None:
    logits = 3 * torch.randn(10, 3, EXPERTS, generator=torch.Generator().manual_seed(0))
    local, padded = slice(2, 4), torch.arange(30).reshape(10, 3) % 4 == 0
    mass = torch.softmax(logits.double(), dim=-1)[..., local].sum(dim=-1)
    assert float(locality_loss(logits, local)) == pytest.approx(-math.log(mass.mean()), rel=1e-5)
    expected = -math.log(mass[~padded].mean())
    assert float(locality_loss(logits, local, padded)) == pytest.approx(expected, rel=1e-5)


def test_no_expert_parallelism_no_locality_loss() -> None:
    """At EP 1 everything is local: gradients are those without the loss."""
    grads = []
    for coefficient in (0.0, 100.0):
        x, router = tokens(), RouterConfig(router="locmoe", locality_loss_coeff=coefficient)
        build(router, transformer_config())(x)[0].square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("pad", [False, True])
def test_switch_counts_what_it_drops(pad: bool) -> None:
    router = made("switch", **CAPACITY, moe_pad_expert_input_to_capacity=pad)
    x = tokens()
    probs, _ = router(x)
    chosen = router.gating(x).flatten(0, 1).argmax(dim=-1)
    capacity = math.ceil(len(chosen) / EXPERTS)
    dropped = sum(max(0, int((chosen == expert).sum()) - capacity) for expert in range(EXPERTS))
    assert 0 < dropped == len(chosen) - int((probs > 0).sum())
    router.eval()
    router(x)  # not counted
    assert recorded(DROPPED) == pytest.approx(dropped / len(chosen))


def test_switch_jitter_is_for_training() -> None:
    router = made("switch", moe_input_jitter_eps=0.1)
    x = tokens()
    jittered = router.apply_input_jitter(x) / x
    assert 0.85 < jittered.min() < 0.95 and 1.05 < jittered.max() < 1.15
    router.eval()
    assert torch.equal(router.apply_input_jitter(x), x)


def test_a_hidden_size_that_experts_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="6 experts do not divide a hidden size of 32"):
        kinds.all_parameters(RouterConfig(router="locmoe", num_experts=6), transformer_config(), False)


def test_what_routers_record_is_reported() -> None:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    for row in kinds.KINDS.values():
        for name in row.metrics:
            report_also(name)
    tracker = MoEMetricsTracker()
    tracker.record(LOCAL, torch.tensor(0.75), 1, 1)
    options = {"track_names": ["z_loss"], "num_layers": 1, "force_initialize": True}
    assert f"{LOCAL}: 0.75" in tracker.report(loss_scale=1.0, iteration=1, **options)


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
    alone, padded = gradients(router, x[:-PADDED], None), gradients(router, x, MASK)
    assert alone[0].abs().sum() > 0
    torch.testing.assert_close(padded[0][:-PADDED], alone[0], rtol=1e-5, atol=1e-9)
    assert not padded[0][-PADDED:].any()
    torch.testing.assert_close(padded[1:], alone[1:], rtol=1e-5, atol=1e-7)


def test_nothing_but_padding_has_no_locality_loss() -> None:
    router = made("locmoe", moe_router_load_balancing_type="none", moe_z_loss_coeff=None)
    found = gradients(router, tokens(), torch.ones(SEQUENCE, BATCH, dtype=torch.bool))
    assert not any(gradient.any() for gradient in found)


def test_switch_counts_no_padding() -> None:
    probs, _ = made("switch", **CAPACITY)(tokens(), padding_mask=MASK)
    kept = int((probs.unflatten(0, (SEQUENCE, BATCH))[:-PADDED] > 0).sum())
    assert recorded(DROPPED) == pytest.approx(1 - kept / ((SEQUENCE - PADDED) * BATCH))
