"""Fine-grained and shared experts: at step 0 the model equals the unsplit one.

The reference is Megatron's arithmetic (``tests/reference/megatron_ffn``) in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint
from tests.dense_checkpoint import FFN, HIDDEN, LAYERS, MLP, make_stats
from tests.reference.megatron_ffn import MegatronFFN

EXPERTS = f"{MLP}.experts.experts"
SHARED = f"{MLP}.shared_experts"


def convert(
    tmp_path: Path, out: str = "moe", shared_expert: bool = False, materialize: bool = False, **router: Any
) -> dict[str, torch.Tensor]:
    stats = tmp_path / "key_stats"
    make_stats(stats)
    options = Options(RouterConfig(**router), (stats,), materialize=materialize, shared_expert=shared_expert)
    conversion.convert(conversion.prepare(tmp_path / "dense", tmp_path / out, options))
    return dense_checkpoint.read_back(tmp_path / out / "release")


def moe_ffn(tensors: dict[str, torch.Tensor], layer: int, x: torch.Tensor, args: Any) -> torch.Tensor:
    """A layer's FFN or experts on one token, in float64."""
    args.pooling = "sum"
    return MegatronFFN({key: value.double() for key, value in tensors.items()}, layer, args).token(x)


@pytest.mark.parametrize("pre_softmax", [False, True], ids=["top-k first", "softmax first"])
@pytest.mark.parametrize("router", ["mixture", "linear"])
@pytest.mark.parametrize("granularity", [2, 3, 8])
def test_cut_experts_are_the_uncut_model(
    tmp_path: Path, granularity: int, router: str, pre_softmax: bool
) -> None:
    dense_checkpoint.write(tmp_path / "dense", tensor_parallel=2)
    common = {"router": router, "pre_softmax": pre_softmax}
    whole = convert(tmp_path, "whole", num_experts=4, top_k=2, **common)
    G = granularity
    cut = convert(tmp_path, "cut", num_experts=4 * G, top_k=2 * G, granularity=G, **common)
    args = [open_checkpoint(tmp_path / name).args for name in ("whole", "cut")]
    assert args[1].moe_ffn_hidden_size == FFN // G and args[1].moe_router_topk_scaling_factor == G
    generator = torch.Generator().manual_seed(0)
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "cut"))
    for layer in range(LAYERS):
        for _ in range(8):
            x = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
            expected, found = (moe_ffn(moe, layer, x, a) for moe, a in zip((whole, cut), args, strict=True))
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", [1, 2])
def test_shared_expert_and_chosen_experts_are_the_dense_model(tmp_path: Path, granularity: int) -> None:
    dense = dense_checkpoint.write(tmp_path / "dense", dense_checkpoint.tensors(torch.bfloat16))
    G = granularity
    moe = convert(
        tmp_path, shared_expert=True, num_experts=4 * G, top_k=2 * G, granularity=G, pre_softmax=False
    )
    args = open_checkpoint(tmp_path / "moe").args
    assert args.moe_shared_expert_intermediate_size == FFN
    assert (args.moe_router_topk_scaling_factor or 1) == G / 2
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for _ in range(8):
            x = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
            found, expected = (moe_ffn(tensors, layer, x, args) for tensors in (moe, dense))
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("materialize", [False, True], ids=["shared", "materialized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
def test_values_and_places(tmp_path: Path, gated: bool, dtype: torch.dtype, materialize: bool) -> None:
    """Expert i*G + g holds rows and columns of shard g, bitwise; G = 3 does not divide the ranks' parts."""
    n, G = 4, 3
    values = dense_checkpoint.tensors(dtype, gated=gated)
    dense_checkpoint.write(
        tmp_path / "dense", values, tensor_parallel=2, args=dense_checkpoint.arguments(swiglu=gated)
    )
    moe = convert(
        tmp_path, shared_expert=True, materialize=materialize, num_experts=n * G, top_k=G, granularity=G
    )
    width = FFN // G
    for layer in range(LAYERS):
        fc1, fc2 = (values[f"{MLP}.linear_fc{i}.weight"][layer] for i in (1, 2))
        for expert in range(n * G):
            begin = expert % G * width
            rows = [part * FFN + begin + row for part in range(1 + gated) for row in range(width)]
            assert torch.equal(moe[f"{EXPERTS}.linear_fc1.weight"][layer, expert], fc1[rows])
            columns = fc2[:, begin : begin + width]
            assert torch.equal(moe[f"{EXPERTS}.linear_fc2.weight"][layer, expert], columns)
    assert torch.equal(moe[f"{SHARED}.linear_fc1.weight"], values[f"{MLP}.linear_fc1.weight"])
    assert torch.equal(moe[f"{SHARED}.linear_fc2.weight"], values[f"{MLP}.linear_fc2.weight"] / 2)
    checkpoint = open_checkpoint(tmp_path / "moe")
    blobs = checkpoint.blobs(f"{EXPERTS}.linear_fc2.weight")
    assert len(blobs) == len(set(blobs)) * (1 if materialize else n)
    states = [f"{SHARED}.linear_fc2._extra_state/shard_{layer}_{LAYERS}" for layer in range(LAYERS)]
    states += [f"{EXPERTS}.linear_fc1._extra_state/shard_0.{n * G - 1}_{LAYERS}.{n * G}"]
    assert set(states) < set(checkpoint.objects)


def test_without_either_the_model_is_as_before(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    convert(tmp_path, num_experts=4)
    record = manifest.read(tmp_path / "moe")
    assert record is not None and not [flag for flag in record["model"] if flag.startswith("moe_")]
    convert(tmp_path, "cut", num_experts=8, granularity=2)
    record = manifest.read(tmp_path / "cut")
    assert record is not None and manifest.router_config(record, "manifest").granularity == 2
    assert record["model"]["moe_ffn_hidden_size"] == FFN // 2
    assert record["model"]["moe_router_topk_scaling_factor"] == 2


@pytest.mark.parametrize(
    ("granularity", "options", "message"),
    [(5, {"num_experts": 20, "top_k": 5}, "does not divide the FFN's width 24")]
    + [(0, {"num_experts": 4}, "must be at least 1"), (2, {"num_experts": 4, "top_k": 3}, "must divide")],
)
def test_what_does_not_divide_is_refused(
    tmp_path: Path, granularity: int, options: dict[str, Any], message: str
) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    with pytest.raises(UserError, match=f"--granularity {granularity}: {message}"):
        convert(tmp_path, granularity=granularity, **options)


@pytest.mark.parametrize("flag", ["--granularity", "--shared-expert"])
def test_biases_are_refused(tmp_path: Path, flag: str) -> None:
    values = dense_checkpoint.tensors(bias=True)
    dense_checkpoint.write(tmp_path / "dense", values, args=dense_checkpoint.arguments(add_bias_linear=True))
    with pytest.raises(UserError, match=f"{flag}: .* has biases in its FFN"):
        convert(tmp_path, shared_expert=flag == "--shared-expert", granularity=1 + (flag == "--granularity"))
