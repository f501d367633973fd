"""The baselines' routers in a real single-process Megatron, beside loops over tokens."""

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.baselines import LocMoERouter, locality_loss
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import DROPPED, LOCAL
from megatron_router_upcycling.training.layer_spec import report_also
from tests.routers.conftest import EXPERTS, build, recorded, tokens, transformer_config

pytestmark = pytest.mark.usefixtures("on_cpu")


SWITCH = RouterConfig(router="switch", num_experts=EXPERTS, top_k=1)


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
        router = RouterConfig(router="locmoe", num_experts=EXPERTS, top_k=2, locality_loss_coeff=coefficient)
        x = tokens()
        made = build(router, transformer_config())
        made(x)[0].square().sum().backward()
        assert isinstance(made, LocMoERouter) and x.grad.any()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("pad", [False, True])
def test_switch_counts_what_it_drops(pad: bool) -> None:
    config = transformer_config(
        moe_router_topk=1,
        moe_expert_capacity_factor=1.0,
        moe_token_dispatcher_type="alltoall",
        moe_pad_expert_input_to_capacity=pad,
    )
    router = build(SWITCH, config)
    x = tokens()
    get_moe_metrics_tracker().metrics.clear()  # type: ignore[attr-defined]
    probs, _ = router(x)
    chosen = router.gating(x).flatten(0, 1).argmax(dim=-1)
    capacity = math.ceil(len(chosen) / EXPERTS)
    dropped = sum(max(0, int((chosen == expert).sum()) - capacity) for expert in range(EXPERTS))
    assert 0 < dropped == len(chosen) - int((probs > 0).sum())
    router.eval()
    router(x)  # not counted
    assert recorded(DROPPED) == pytest.approx(dropped / len(chosen))


def test_switch_jitter_is_for_training() -> None:
    config = transformer_config(moe_router_topk=1, moe_input_jitter_eps=0.1)
    router = build(SWITCH, config)
    x = tokens()
    jittered = router.apply_input_jitter(x) / x
    assert 0.85 < jittered.min() < 0.95 and 1.05 < jittered.max() < 1.15
    router.eval()
    assert torch.equal(router.apply_input_jitter(x), x)


def test_a_hidden_size_that_experts_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="6 experts do not divide a hidden size of 32"):
        kinds.all_parameters(RouterConfig(router="locmoe", num_experts=6), kinds.Sizes(32, 4, 8))


def test_what_routers_record_is_reported() -> None:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    for row in kinds.KINDS.values():
        for name in row.metrics:
            report_also(name)
    tracker = MoEMetricsTracker()
    tracker.record(LOCAL, torch.tensor(0.75), 1, 1)
    said = tracker.report(
        loss_scale=1.0, iteration=1, track_names=["z_loss"], num_layers=1, force_initialize=True
    )
    assert f"{LOCAL}: 0.75" in said
