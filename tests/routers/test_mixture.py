"""MixtureRouter beside the stock TopKRouter."""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_router_upcycling.routers.config import POOLINGS, RouterConfig
from megatron_router_upcycling.routers.fold import fold
from tests.routers.conftest import BATCH, EXPERTS, HIDDEN, SEQUENCE, build, tokens, transformer_config

pytestmark = pytest.mark.usefixtures("on_cpu")
MIXTURE = RouterConfig(num_experts=EXPERTS)


def direct_logits(
    x: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, num_experts: int, pooling: str
) -> torch.Tensor:
    """Eq. 6-8 as written: all queries, all scores, then the pooling over routers and over keys."""
    query = torch.einsum("mqd,sbd->sbmq", weight, x)
    scores = torch.einsum("sbmq,kq->sbmk", query, key) / math.sqrt(key.shape[1])
    pooled = scores.sum(dim=2) if pooling == "sum" else scores.max(dim=2).values
    return pooled.unflatten(-1, (num_experts, -1)).max(dim=-1).values


def test_from_scratch_the_parameters_have_the_models_initialisation() -> None:
    config = transformer_config(hidden_size=512, kv_channels=64, num_attention_heads=8, init_method_std=0.05)
    router = build(RouterConfig(), config, scale=1)
    assert router.query_weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert router.expert_key.std().item() == pytest.approx(0.05, rel=0.15)


def test_sharded_state_dict_is_replicated_with_the_layers_in_front() -> None:
    router = build(RouterConfig(num_experts=EXPERTS, num_routers=4), transformer_config())
    prefix = "decoder.layers.mlp.router."
    sharded = router.sharded_state_dict(prefix, sharded_offsets=((0, 1, 4),))
    shapes = {name.removeprefix(prefix): entry.global_shape for name, entry in sharded.items()}
    assert shapes == {"query_weight": (4, 4, 8, HIDDEN), "expert_key": (4, EXPERTS, 8)}
    for name, parameter in router.named_parameters():
        entry = sharded[prefix + name]
        assert entry.key == prefix + name and entry.global_offset[0] == 1
        assert entry.axis_fragmentations == (4, *[1] * parameter.dim())
        assert entry.replica_id == (0, 0, 0) and entry.data.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_routers, experts", [(8, 8), (1, 8), (4, 8), (8, 4), (16, 8), (32, 8)])
def test_logits_and_gradients_equal_the_direct_form(num_routers: int, experts: int, pooling: str) -> None:
    """In float64; the tolerance is relative to the largest entry."""
    config = transformer_config(
        num_moe_experts=experts, moe_router_dtype="fp64", params_dtype=torch.float64, moe_z_loss_coeff=None
    )
    router = build(RouterConfig(num_experts=experts, num_routers=num_routers, pooling=pooling), config)
    leaves = (x := tokens(torch.float64), router.query_weight, router.expert_key)
    folded, direct = router.gating(x), direct_logits(*leaves, experts, pooling)
    grad = torch.randn_like(folded)
    found = (folded, *torch.autograd.grad(folded, leaves, grad))
    expected = (direct, *torch.autograd.grad(direct, leaves, grad))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-13 * b.abs().max()


@pytest.mark.parametrize("router_dtype", ["fp32", "fp64", None])
@pytest.mark.parametrize("params_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_dtype_of_logits_and_of_gradients(router_dtype: str | None, params_dtype: torch.dtype) -> None:
    router = build(MIXTURE, transformer_config(moe_router_dtype=router_dtype, params_dtype=params_dtype))
    x = tokens(params_dtype)
    logits = router.gating(x)
    assert logits.dtype == {"fp32": torch.float32, "fp64": torch.float64, None: params_dtype}[router_dtype]
    logits.sum().backward()
    assert x.grad.dtype == router.query_weight.grad.dtype == router.expert_key.grad.dtype == params_dtype


def test_a_bfloat16_model_routes_in_float32() -> None:
    """The gate is not rounded to bfloat16: the logits are a float32 computation on the stored values."""
    router = build(MIXTURE, transformer_config(params_dtype=torch.bfloat16))
    x, parts = tokens(torch.bfloat16), (router.query_weight, router.expert_key)
    exact = direct_logits(x.double(), *(part.double() for part in parts), EXPERTS, "sum")
    assert (router.gating(x) - exact).abs().max() <= 2e-6 * exact.abs().max()
    rounded = x.float() @ fold(*parts, "sum").bfloat16().float().T
    assert (rounded - exact).abs().max() > 1e-3 * exact.abs().max()


def test_activation_recompute_gives_the_same_gradients() -> None:
    router = build(MIXTURE, transformer_config())
    wanted, grads = [x := tokens(), *router.parameters()], []
    for probs, _ in (router(x), checkpoint(router, x, use_reentrant=False)):
        grads.append(torch.autograd.grad(probs.square().sum(), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


FEATURES: dict[str, dict[str, Any]] = {
    "paper": {},
    "softmax_after_top_k": {"moe_router_pre_softmax": False},
    "sequence_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "token_dropping": {"moe_expert_capacity_factor": 0.75},
    "expert_bias": {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "bias": {"add_bias_linear": True},
}


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_routing_is_the_stock_routers_bit_for_bit(changes: dict[str, Any]) -> None:
    mixture = build(MIXTURE, transformer_config(**changes))
    stock = build(None, mixture.config)
    stock.weight.data.copy_(fold(mixture.query_weight, mixture.expert_key, "sum"))
    if mixture.bias is not None:
        stock.bias.data.copy_(mixture.bias)
    found = []
    for router in (mixture, stock):
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-1, 1, EXPERTS))
        x = tokens()
        probs, routing_map = router(x)
        grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(2))
        probs.backward(grad.to(probs.dtype))
        found.append((probs, routing_map, x.grad))
    (probs, routing_map, grad), (expected_probs, expected_map, expected_grad) = found
    assert torch.equal(probs, expected_probs) and torch.equal(routing_map, expected_map)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    if mixture.expert_bias is not None:
        assert torch.equal(mixture.local_tokens_per_expert, stock.local_tokens_per_expert)
        assert mixture.local_tokens_per_expert.sum() == 2 * SEQUENCE * BATCH

    # The chain rule from the gate's gradient to the parameters': every W^j receives the same.
    grad_gate = stock.weight.grad / math.sqrt(mixture.expert_key.shape[1])
    for grad in mixture.query_weight.grad:
        torch.testing.assert_close(grad, mixture.expert_key.T @ grad_gate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        mixture.expert_key.grad, grad_gate @ mixture.query_weight.sum(0).T, rtol=1e-5, atol=1e-5
    )
