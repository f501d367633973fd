"""Which attention and experts a run takes: decided from its arguments, and built into Megatron's specs."""

from argparse import Namespace
from typing import Any

import pytest
from megatron.core.transformer.enums import AttnBackend

from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.device import ENGINE, MEGATRON, SDPA
from tests import launch
from tests.layers import one_rank

ARGS: dict[str, Any] = {"context_parallel_size": 1, "multi_latent_attention": False, "fp8": None}


@pytest.mark.parametrize(
    "backend, without_te, with_te",
    [
        ("auto", SDPA, SDPA),
        ("flash", SDPA, ENGINE),
        ("fused", SDPA, ENGINE),
        ("unfused", MEGATRON, ENGINE),
        ("local", MEGATRON, MEGATRON),
    ],
)
def test_the_users_word_decides(backend: str, without_te: str, with_te: str) -> None:
    args = Namespace(**ARGS, attention_backend=AttnBackend[backend])
    assert [device.choose_attention(args, te) for te in (False, True)] == [without_te, with_te]


def test_what_pytorchs_attention_cannot_do_is_transformer_engines() -> None:
    for name, value in (("context_parallel_size", 2), ("fp8", "hybrid"), ("multi_latent_attention", True)):
        args = Namespace(**ARGS | {name: value}, attention_backend=AttnBackend.auto)
        assert device.choose_attention(args, True) == ENGINE


def test_transformer_engines_specs_take_pytorchs_products() -> None:
    """In a process of its own: symbols stay replaced."""
    launch.python("-c", "from tests.training import test_choices_on_a_gpu as t; t.check_specs()").ok()


def test_a_norm_hands_its_input_to_the_residual() -> None:
    """In a process of its own: symbols stay replaced."""
    launch.python("-c", "from tests.training import test_choices_on_a_gpu as t; t.check_norms()").ok()


def check_norms() -> None:
    one_rank.start()
    import torch
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from megatron_router_upcycling.training.patches import layers

    values = {"normalization": "RMSNorm", "params_dtype": torch.bfloat16, "hidden_dropout": 0.0}
    config = one_rank.config(attention_dropout=0.0, **values)
    x = torch.randn(6, 2, one_rank.D, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights: dict[str, torch.Tensor] = {}
    found = []
    for kind in (torch.nn.RMSNorm, layers.RMSNormBeforeResidual):
        if kind is not torch.nn.RMSNorm:
            layers._wrap_on_gpu(layers.torch_norm.WrappedTorchNorm, "__new__", layers._norm_in_one_kernel)
            layers._wrap_on_gpu(LocalSpecProvider, "layer_norm", layers._norm_before_residual)
        layer = build_module(get_gpt_layer_local_spec(normalization="RMSNorm"), config=config).bfloat16()
        assert type(layer.input_layernorm) is type(layer.pre_mlp_layernorm) is kind
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        output, _ = layer(leaf := x.clone().requires_grad_(), attention_mask=None)
        output.float().square().sum().backward()
        found.append([output, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_specs() -> None:
    one_rank.start()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_router_upcycling.layers import experts, kernels
    from megatron_router_upcycling.layers.attention import SdpaAttention
    from megatron_router_upcycling.layers.experts import GroupedExperts
    from megatron_router_upcycling.training.patches import layers

    groups = ProcessGroupCollection.use_mpu_process_groups()
    flags = {"apply_rope_fusion": False, "num_experts": 4, "moe_grouped_gemm": True}
    args = Namespace(**flags, attention_backend=AttnBackend.auto)
    assert "experts: PyTorch's grouped products" in layers.install_on_gpu(args, False, SDPA)[-1]
    # The norm is mended and, where there are kernels, made faster.
    config = one_rank.config(sequence_parallel=True, tensor_model_parallel_size=2, normalization="RMSNorm")
    norm = WrappedTorchNorm(config, 32)
    assert norm.weight.sequence_parallel and (type(norm) is layers.RMSNorm) == kernels.WANTED
    assert "older than Hopper" in layers.install_on_gpu(args, True, ENGINE)[-1]  # and nothing is replaced
    provider = TESpecProvider()
    assert provider.core_attention() is not SdpaAttention
    experts.usable = lambda device: None
    layers.install_on_gpu(args, True, SDPA)
    assert provider.core_attention() is SdpaAttention

    def build(grouped: bool, **changes: Any) -> Any:
        config = one_rank.config(num_moe_experts=4, **changes)
        return provider.grouped_mlp_modules(grouped)(4, config, pg_collection=groups, name=None)

    ours, loop = build(True), build(False)
    assert type(ours) is GroupedExperts and type(loop) is SequentialMLP
    # What does not fit is Megatron's own module, which without Transformer Engine is the loop.
    assert type(build(True, add_bias_linear=True)) is SequentialMLP
