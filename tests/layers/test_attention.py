"""Attention through scaled_dot_product_attention against Megatron's module that materialises the scores."""

import itertools
from typing import Any

import pytest
import torch

from tests import launch
from tests.layers import one_rank

S, B, D = 24, 2, 8
TOLERANCE = 5e-6


def test_equal_to_megatrons_forward_and_backward() -> None:
    launch.python("-c", "from tests.layers import test_attention; test_attention.compare()").ok()


def compare() -> None:
    one_rank.start()
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_router_upcycling.layers.attention import SdpaAttention

    assert LocalSpecProvider().core_attention() is SdpaAttention
    torch.manual_seed(0)
    documents = torch.ones(B, 1, S, S, dtype=torch.bool).triu(1)  # True: must not be seen
    documents[1, :, S // 2 :, : S // 2] = True
    for groups, mask, scale in itertools.product((4, 2, 1), (None, documents), (None, 0.2)):
        ours, theirs = (build(kind, groups, scale) for kind in (SdpaAttention, DotProductAttention))
        assert not list(ours.parameters())
        expected, found = run(theirs, groups, mask), run(ours, groups, mask)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE)
    window = {"window_size": (4, 0)}
    kinds = DotProductAttention, SdpaAttention
    expected, found = (run(build(kind, 2, **window), 2, None) for kind in kinds)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.allclose(found["output"], run(build(SdpaAttention, 2), 2, None)["output"], atol=1e-3)
    dropping = build(SdpaAttention, 2, attention_dropout=0.5)
    assert not torch.equal(*[run(dropping, 2, None)["output"] for _ in range(2)])
    dropping.eval()
    assert torch.equal(run(dropping, 2, None)["output"], run(build(SdpaAttention, 2), 2, None)["output"])
    with pytest.raises(AssertionError, match="Context parallelism"):
        build(SdpaAttention, 2, context_parallel_size=2)


def build(kind: Any, groups: int, scale: float | None = None, **changes: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    values = {"attention_dropout": 0.0, "num_query_groups": groups, "masked_softmax_fusion": False}
    config = one_rank.config(kv_channels=D, **values | changes)
    return kind(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)


def run(attention: Any, groups: int, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(S, B, heads, D, generator=generator, requires_grad=True) for heads in (4, groups, groups)
    )
    output = attention(query, key, value, mask)
    output.backward(torch.randn(output.shape, generator=generator))
    grads = {"query": query.grad, "key": key.grad, "value": value.grad}
    return {"output": output.detach()} | {name: grad for name, grad in grads.items() if grad is not None}
