"""MixtureRouter in a real single-process Megatron, beside the stock TopKRouter."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.base import builder
from megatron_router_upcycling.routers.config import POOLINGS, RouterConfig
from megatron_router_upcycling.routers.fold import fold
from megatron_router_upcycling.routers.mixture import MixtureRouter

HIDDEN, HEADS, HEAD_DIM, EXPERTS = 32, 8, 4, 8
SEQUENCE, BATCH = 24, 2


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's router asks CUDA for its device, and compiles a small function."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    with torch._dynamo.config.patch(disable=True):
        yield


def transformer_config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=4 * HIDDEN,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.02,
        moe_z_loss_coeff=0.001,
        add_bias_linear=False,
    )
    return TransformerConfig(**(values | changes))


def build(router: RouterConfig | None, config: TransformerConfig, seed: int = 0) -> TopKRouter:
    """A router in training mode, with weights large enough to route by; the stock one for None."""
    torch.manual_seed(seed)
    make = TopKRouter if router is None else builder(router)
    made = make(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
    made.set_layer_number(1)
    for parameter in made.parameters():
        parameter.data.mul_(20)
    return made


def stock_twin(mixture: MixtureRouter) -> TopKRouter:
    """The stock router whose linear gate is what ``mixture`` folds to."""
    stock = build(None, mixture.config)
    stock.weight.data.copy_(fold(mixture.query_weight, mixture.expert_key, "sum"))
    if mixture.bias is not None:
        stock.bias.data.copy_(mixture.bias)
    return stock


def tokens(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).to(dtype).requires_grad_()


def direct_logits(
    x: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, num_experts: int, pooling: str
) -> torch.Tensor:
    """Eq. 6-8 as written: all queries, all scores, then the pooling over routers and over keys."""
    query = torch.einsum("mqd,sbd->sbmq", weight, x)
    scores = torch.einsum("sbmq,kq->sbmk", query, key) / math.sqrt(key.shape[1])
    pooled = scores.sum(dim=2) if pooling == "sum" else scores.max(dim=2).values
    return pooled.unflatten(-1, (num_experts, -1)).max(dim=-1).values


def backward(router: TopKRouter, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, then backward with fixed gradients of the probabilities."""
    probs, routing_map = router(x)
    grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(2))
    probs.backward(grad.to(probs.dtype))
    return probs, routing_map


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_stock_gate_is_gone_and_ours_are_marked(sequence_parallel: bool) -> None:
    config = transformer_config(params_dtype=torch.bfloat16, bf16=True)
    config.sequence_parallel = sequence_parallel
    router = build(RouterConfig(num_experts=EXPERTS, num_routers=4), config)
    parameters = dict(router.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert shapes == {"query_weight": (4, 8, HIDDEN), "expert_key": (EXPERTS, 8)}
    assert set(router.state_dict()) == set(parameters) and router.weight is None
    for parameter in parameters.values():
        assert parameter.dtype == torch.bfloat16
        assert parameter.sequence_parallel is sequence_parallel


def test_from_scratch_the_parameters_have_the_models_initialisation() -> None:
    config = transformer_config(hidden_size=512, kv_channels=64, num_attention_heads=8, init_method_std=0.05)
    torch.manual_seed(0)
    router = builder(RouterConfig())(config=config, pg_collection=get_default_pg_collection())
    assert router.query_weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert router.expert_key.std().item() == pytest.approx(0.05, rel=0.15)


def test_heads_that_do_not_fit_are_the_users_error() -> None:
    with pytest.raises(UserError, match="--num-routers 3"):
        build(RouterConfig(num_experts=EXPERTS, num_routers=3), transformer_config())


def test_sharded_state_dict_is_replicated_with_the_layers_in_front() -> None:
    router = build(RouterConfig(num_experts=EXPERTS), transformer_config())
    prefix = "decoder.layers.mlp.router."
    sharded = router.sharded_state_dict(prefix, sharded_offsets=((0, 1, 4),))
    assert set(sharded) == {prefix + "query_weight", prefix + "expert_key"}
    for name, parameter in router.named_parameters():
        entry = sharded[prefix + name]
        assert entry.key == prefix + name
        assert entry.global_shape == (4, *parameter.shape) and entry.global_offset[0] == 1
        assert entry.axis_fragmentations == (4, *[1] * parameter.dim())
        assert entry.replica_id == (0, 0, 0) and entry.data.data_ptr() == parameter.data_ptr()


def test_state_dict_round_trip() -> None:
    config, options = transformer_config(), RouterConfig(num_experts=EXPERTS, num_routers=4)
    first, second = build(options, config, seed=0), build(options, config, seed=1)
    second.load_state_dict(first.state_dict())
    x = tokens()
    assert torch.equal(first.gating(x), second.gating(x))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_routers, experts", [(8, 8), (4, 8), (8, 4), (16, 8), (32, 8)])
def test_logits_and_gradients_equal_the_direct_form(num_routers: int, experts: int, pooling: str) -> None:
    """In float64; the tolerance is relative to the largest entry."""
    config = transformer_config(
        num_moe_experts=experts, moe_router_dtype="fp64", params_dtype=torch.float64, moe_z_loss_coeff=None
    )
    router = build(RouterConfig(num_experts=experts, num_routers=num_routers, pooling=pooling), config)
    parameters = (router.query_weight, router.expert_key)
    x = tokens(torch.float64)
    folded = router.gating(x)
    direct = direct_logits(x, *parameters, experts, pooling)
    grad = torch.randn_like(folded)
    found = (folded, *torch.autograd.grad(folded, (x, *parameters), grad))
    expected = (direct, *torch.autograd.grad(direct, (x, *parameters), grad))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-13 * b.abs().max()


@pytest.mark.parametrize("router_dtype", ["fp32", "fp64", None])
@pytest.mark.parametrize("params_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_dtype_of_logits_and_of_gradients(router_dtype: str | None, params_dtype: torch.dtype) -> None:
    router = build(
        RouterConfig(num_experts=EXPERTS),
        transformer_config(moe_router_dtype=router_dtype, params_dtype=params_dtype),
    )
    x = tokens(params_dtype)
    logits = router.gating(x)
    assert logits.dtype == {"fp32": torch.float32, "fp64": torch.float64, None: params_dtype}[router_dtype]
    logits.sum().backward()
    assert x.grad.dtype == router.query_weight.grad.dtype == router.expert_key.grad.dtype == params_dtype


def test_a_bfloat16_model_routes_in_float32() -> None:
    """The gate is not rounded to bfloat16: the logits are a float32 computation on the stored values."""
    router = build(RouterConfig(num_experts=EXPERTS), transformer_config(params_dtype=torch.bfloat16))
    x = tokens(torch.bfloat16)
    exact = direct_logits(
        x.double(), router.query_weight.double(), router.expert_key.double(), EXPERTS, "sum"
    )
    logits = router.gating(x)
    assert (logits - exact).abs().max() <= 2e-6 * exact.abs().max()
    rounded = x.float() @ fold(router.query_weight, router.expert_key, "sum").bfloat16().float().T
    assert (rounded - exact).abs().max() > 1e-3 * exact.abs().max()


def test_gradients_add_up_over_micro_batches() -> None:
    router = build(RouterConfig(num_experts=EXPERTS), transformer_config())
    separate = []
    for seed in (1, 2):
        router.zero_grad()
        backward(router, tokens(seed=seed))
        separate.append([parameter.grad.clone() for parameter in router.parameters()])
    router.zero_grad()
    for seed in (1, 2):
        backward(router, tokens(seed=seed))
    for parameter, first, second in zip(router.parameters(), *separate, strict=True):
        assert torch.equal(parameter.grad, first + second)


def test_activation_recompute_gives_the_same_gradients() -> None:
    router = build(RouterConfig(num_experts=EXPERTS), transformer_config())
    grads = []
    for recompute in (False, True):
        router.zero_grad()
        x = tokens()
        probs, _ = checkpoint(router, x, use_reentrant=False) if recompute else router(x)
        probs.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in router.parameters())])
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
    mixture = build(RouterConfig(num_experts=EXPERTS), transformer_config(**changes))
    stock = stock_twin(mixture)
    if mixture.expert_bias is not None:
        for router in (mixture, stock):
            router.expert_bias.copy_(torch.linspace(-1, 1, EXPERTS))
    x, y = tokens(), tokens()
    probs, routing_map = backward(mixture, x)
    expected_probs, expected_map = backward(stock, y)
    assert torch.equal(probs, expected_probs) and torch.equal(routing_map, expected_map)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
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


def test_the_auxiliary_losses_reach_both_parameters() -> None:
    grads = []
    for coefficient in (0.0, 0.5):
        router = build(RouterConfig(num_experts=EXPERTS), transformer_config(moe_aux_loss_coeff=coefficient))
        backward(router, tokens())
        grads.append([parameter.grad for parameter in router.parameters()])
    assert all((a - b).abs().max() > 0 for a, b in zip(*grads, strict=True))


def test_replay_uses_the_recorded_experts() -> None:
    RouterReplay.clear_global_router_replay_instances()
    try:
        router = build(RouterConfig(num_experts=EXPERTS), transformer_config(moe_enable_routing_replay=True))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        _, recorded = router(tokens(seed=1))
        RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        _, replayed = router(tokens(seed=2))
        RouterReplay.clear_global_router_replay_action()
        _, own = router(tokens(seed=2))
    finally:
        RouterReplay.clear_global_router_replay_instances()
    assert torch.equal(recorded, replayed) and not torch.equal(replayed, own)
