"""The dispatcher of one rank against Megatron's, each in an MoE layer on the CPU."""

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from tests import launch
from tests.layers import one_rank

SEQUENCE, BATCH, EXPERTS = 12, 2, 6
TOLERANCE = 2e-6  # float32, values of order 1


def test_equal_to_megatrons_forward_and_backward() -> None:
    """In a process of its own, with Megatron on the CPU."""
    launch.python("-c", "from tests.layers import test_dispatch; test_dispatch.compare()").ok()


def compare() -> None:
    one_rank.start()
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_router_upcycling.layers.dispatch import OneRankDispatcher, UpcycledMoELayer

    for grouped, top_k, gate in itertools.product((False, True), (1, 2, EXPERTS), GATES):
        ours = build(UpcycledMoELayer, top_k, grouped)
        theirs = build(MoELayer, top_k, grouped)
        assert isinstance(ours.token_dispatcher, OneRankDispatcher)
        assert isinstance(theirs.token_dispatcher, MoEAlltoAllTokenDispatcher)
        GATES[gate](ours.router.weight.data)
        theirs.load_state_dict(ours.state_dict())
        found, expected = run(ours), run(theirs)
        assert found.keys() == expected.keys() and {"hidden", "probs", "router.weight"} <= found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE)
        if gate == "idle" and top_k < 3:
            assert (found["rows"] == 0).sum() >= 2
    # Where a token may have fewer rows than k, Megatron's dispatcher stays.
    for changes in ({"moe_expert_capacity_factor": 1.0}, {"moe_token_dispatcher_type": "allgather"}):
        layer = build(UpcycledMoELayer, 2, False, **changes)
        covered = "moe_token_dispatcher_type" in changes
        assert isinstance(layer.token_dispatcher, OneRankDispatcher) == covered, changes


# How the gate chooses: experts as drawn, every expert alike (ties), or two that nobody chooses, by the first
# column, which is a bias: hidden states begin with a large number.
GATES = {
    "drawn": lambda weight: None,
    "ties": lambda weight: weight.zero_(),
    "idle": lambda weight: weight[-2:, 0].fill_(-3.0),
}


def build(kind: Any, top_k: int, grouped: bool, **changes: Any) -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    values: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall", "init_method_std": 0.2} | changes
    values |= {"num_moe_experts": EXPERTS, "moe_aux_loss_coeff": 0.0}
    config = one_rank.config(moe_router_topk=top_k, moe_router_pre_softmax=True, **values)
    experts = LocalSpecProvider().grouped_mlp_modules(grouped)
    layer = kind(config, MoESubmodules(experts=experts), layer_number=1)
    layer.router.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    return layer


def run(layer: Any) -> dict[str, torch.Tensor]:
    """The layer's output, all its gradients, and how many rows each expert had; twice, as in training."""
    generator = torch.Generator().manual_seed(2)
    seen: dict[str, torch.Tensor] = {}
    route = layer.route

    def keep_probs(*args: Any, **kwargs: Any) -> Any:
        probs, routing_map = route(*args, **kwargs)
        probs.retain_grad()
        seen["probs"] = probs
        return probs, routing_map

    layer.route = keep_probs
    layer.experts.register_forward_pre_hook(lambda _, args: seen.update(rows=args[1]))
    found: dict[str, torch.Tensor] = {}
    for micro_batch in range(2):
        hidden = torch.randn(SEQUENCE, BATCH, one_rank.D, generator=generator)
        hidden[..., 0] = 9.0
        hidden.requires_grad_()
        output, bias = layer(hidden)
        assert bias is None and output.shape == hidden.shape
        output.backward(torch.randn(output.shape, generator=generator))
        assert hidden.grad is not None and seen["probs"].grad is not None
        found |= {
            f"output {micro_batch}": output.detach(),
            "hidden": hidden.grad,
            "probs": seen["probs"].grad,
            "rows": seen["rows"].long().cpu(),
        }
    for name, parameter in layer.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def test_what_is_covered() -> None:
    from megatron_router_upcycling.layers.dispatch import covers

    names = ("moe_router_padding_for_quantization", "moe_shared_expert_overlap", "moe_latent_size")
    values: dict[str, Any] = dict.fromkeys(names) | {"moe_token_dispatcher_type": "alltoall"}
    config = SimpleNamespace(**values, moe_expert_capacity_factor=None, moe_grouped_gemm=False)
    assert covers(config, 1) and not covers(config, 2)
    for name, value, expected in (
        ("moe_token_dispatcher_type", "allgather", True),
        ("moe_token_dispatcher_type", "flex", False),
        ("moe_expert_capacity_factor", 1.25, False),
        ("cuda_graph_impl", "local", False),
        *((name, 16, False) for name in names),
    ):
        assert covers(SimpleNamespace(**vars(config) | {name: value}), 1) is expected, name
