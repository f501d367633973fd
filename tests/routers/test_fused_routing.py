"""Routing of a router of ours in its few steps against Megatron's ``TopKRouter.routing``.

On the CPU the kernel is not usable; here its plain form takes its place.
"""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_router_upcycling.layers.kernels import routing as kernel
from megatron_router_upcycling.layers.statistics import SUMS, routing_sums
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.patches import cpu_backend
from tests import launch
from tests.routers.conftest import BATCH, EXPERTS, SEQUENCE, build, transformer_config

ROUTER = RouterConfig(num_experts=EXPERTS, top_k=2)
SCALE = 0.25  # of the auxiliary losses' gradients
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The plain form in the kernel's place; the calls of it."""
    calls: list[tuple[Any, ...]] = []

    def route(*args: Any) -> kernel.Routing:
        calls.append(args)
        return kernel.plain(*args)

    monkeypatch.setattr(kernel, "usable", lambda logits: True)
    monkeypatch.setattr(kernel, "route", route)
    return calls


@pytest.fixture(autouse=True)
def scaled(on_cpu: None) -> None:
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(SCALE))


def draw(seed: int = 3) -> torch.Tensor:
    return 2 * torch.randn(SEQUENCE, BATCH, EXPERTS, generator=torch.Generator().manual_seed(seed))


def routed(route: Any, logits: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What ``route`` gives for two micro-batches, the gradients, and what Megatron's log would have."""
    found: dict[str, torch.Tensor] = {}
    for number in range(2):
        leaf = logits.roll(number, 0).requires_grad_()
        probs, routing_map = route(leaf, **kwargs)
        found |= {f"probs {number}": probs.detach(), f"map {number}": routing_map}
        if probs.requires_grad:
            weights = torch.randn(probs.shape, generator=torch.Generator().manual_seed(4))
            probs.backward(weights)
            assert leaf.grad is not None
            found[f"gradient {number}"] = leaf.grad
    metrics = get_moe_metrics_tracker().metrics
    found |= {f"metric {name}": entry.values.clone() for name, entry in metrics.items()}
    for name, entry in metrics.items():
        groups = (entry.reduce_group, entry.avg_group)
        found[f"groups of {name}"] = torch.tensor([0 if group is None else group.size() for group in groups])
        found[f"averaged {name}"] = torch.tensor(entry.needs_dp_avg)
    metrics.clear()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize("losses", ["both", "z-loss", "balancing", "list", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_megatrons(
    fused: list[tuple[Any, ...]], per_token: bool, pre_softmax: bool, losses: str, training: bool
) -> None:
    changes: dict[str, Any] = {
        "both": {},
        "z-loss": {"moe_router_load_balancing_type": "none"},
        "balancing": {"moe_z_loss_coeff": None},
        "list": {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.05]},
        "none": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None},
    }[losses]
    config = transformer_config(
        moe_router_pre_softmax=pre_softmax, calculate_per_token_loss=per_token, **changes
    )
    router = build(ROUTER, config).train(training)
    logits = draw()
    expected = routed(lambda x: TopKRouter.routing(router, x), logits)
    assert not fused
    found = routed(router.routing, logits)
    assert len(fused) == 2 and found.keys() == expected.keys()
    names = {"both": 2, "z-loss": 1, "balancing": 1, "list": 1 + 1, "none": 0}[losses] if training else 0
    assert len([name for name in found if name.startswith("metric ")]) == names
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-7, msg=lambda m, n=name: n + m)


def test_tensor_parallel_ranks_share_their_loads() -> None:
    """Two processes, each with other tokens, as with sequence parallelism."""
    launch.ranks(2, __file__).ok()


def compare_on_two_ranks() -> None:
    cpu_backend.install()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    kernel.usable, kernel.route = lambda logits: True, kernel.plain
    rank = torch.distributed.get_rank()
    for per_token in (False, True):
        changes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
        router = build(ROUTER, transformer_config(calculate_per_token_loss=per_token, **changes))
        expected, found = (
            routed(route, draw(rank)) for route in (partial(TopKRouter.routing, router), router.routing)
        )
        assert int(expected["groups of load_balancing_loss"][0]) == 2
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-7, msg=lambda m, n=name: n + m)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_statistics_are_those_of_the_log(fused: list[tuple[Any, ...]], pre_softmax: bool) -> None:
    router = build(ROUTER, transformer_config(moe_router_pre_softmax=pre_softmax))
    logits = draw()
    weights, routing_map = router.routing(logits)
    scores = logits.flatten(0, 1).softmax(dim=1)
    expected = routing_sums(scores, weights.detach(), routing_map, ROUTER.top_k)
    assert len(expected) == len(SUMS) + EXPERTS
    torch.testing.assert_close(router.statistics, expected, rtol=1e-6, atol=1e-6)
    router.routing(logits, padding_mask=torch.zeros(SEQUENCE, BATCH, dtype=torch.bool))
    assert router.statistics is None


def test_the_losses_gradients_are_felt(fused: list[tuple[Any, ...]]) -> None:
    """So that their equality above says something."""
    unbalanced: dict[str, Any] = {"moe_router_load_balancing_type": "none"}
    choices = ({}, {"moe_z_loss_coeff": None}, unbalanced)
    both, *others = (routed(build(ROUTER, transformer_config(**c)).routing, draw()) for c in choices)
    assert all((both["gradient 0"] - other["gradient 0"]).abs().max() > 1e-5 for other in others)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]},
        SIGMOID,
        SIGMOID | {"moe_router_enable_expert_bias": True},
        {"moe_router_topk_scaling_factor": 2.5},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_enable_routing_replay": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_else_a_configuration_asks_for_is_megatrons(
    fused: list[tuple[Any, ...]], changes: dict[str, Any]
) -> None:
    router = build(ROUTER, transformer_config(**changes))
    expected = routed(lambda x: TopKRouter.routing(router, x), draw())
    found = routed(router.routing, draw())
    assert not fused
    for name, value in expected.items():
        if not name.startswith("metric global"):  # which counts on
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_padding_is_megatrons(fused: list[tuple[Any, ...]]) -> None:
    router = build(ROUTER, transformer_config())
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    padding[-3:] = True
    router.routing(draw(), padding_mask=padding)
    assert not fused


if __name__ == "__main__":
    compare_on_two_ranks()
