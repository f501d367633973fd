"""What differs where fused kernels are missing, or where they hold the routers."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.enums import CudaGraphModule

from megatron_router_upcycling.checkpoint.format.files import locate, read_record
from megatron_router_upcycling.checkpoint.format.metadata import METADATA, parse_metadata
from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.run_log.listener import routers_in_cuda_graphs

# Arguments of a run on a GPU, as far as they are read.
ARGS: dict[str, Any] = {"cuda_graph_impl": "none", "cuda_graph_modules": [], "te_rng_tracker": False}
ARGS |= {"num_experts": 8, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
ARGS |= {"tensor_model_parallel_size": 1, "moe_token_dispatcher_type": "alltoall"}
ARGS |= {"moe_expert_capacity_factor": None, "moe_router_padding_for_quantization": False}
ARGS |= {"moe_shared_expert_overlap": False, "moe_latent_size": None, "moe_grouped_gemm": True}
ARGS |= {"distributed_backend": "nccl", "ddp_average_in_collective": True}
ARGS |= {"gradient_accumulation_fusion": False}
GRAPHS = {"cuda_graph_impl": "local"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries that are found."""
    found = {"transformer_engine", device.APEX_EXTENSION}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    return found


def test_with_transformer_engine_only_apexs_kernel_is_missed(installed: set[str]) -> None:
    args = Namespace(**ARGS | {"gradient_accumulation_fusion": True})
    assert device.adapt(args, "cuda") is None and args.gradient_accumulation_fusion
    args.distributed_backend = "gloo"  # which averages no gradients
    line = device.adapt(args, "cuda")
    assert line == "GPU with Transformer Engine: set ddp_average_in_collective=False"
    installed.remove(device.APEX_EXTENSION)
    assert device.adapt(args, "cuda") == "GPU without apex: set gradient_accumulation_fusion=False"
    assert args.moe_grouped_gemm and not args.gradient_accumulation_fusion


@pytest.mark.parametrize(
    "changes, modules",
    [
        ({}, []),  # the whole layer
        ({"expert_model_parallel_size": 8}, ["attn", "moe_router"]),
        ({"moe_grouped_gemm": False}, ["attn", "moe_router"]),
        ({"tensor_model_parallel_size": 2}, ["attn", "moe_router"]),
        ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, []),
        ({"expert_model_parallel_size": 8, "num_experts": None}, []),
        ({"expert_model_parallel_size": 8, "cuda_graph_modules": [CudaGraphModule.attn]}, ["attn"]),
    ],
)
def test_a_whole_layer_is_captured_where_its_dispatcher_can_be(
    changes: dict[str, Any], modules: list[str], installed: set[str]
) -> None:
    args = Namespace(**ARGS | GRAPHS | changes)
    line = device.adapt(args, "cuda")
    assert [module.name for module in args.cuda_graph_modules] == modules
    assert args.te_rng_tracker and args.ddp_average_in_collective
    assert line and "te_rng_tracker=True" in line
    asked = changes.get("cuda_graph_modules", [])
    assert (f"cuda_graph_modules={modules}" in line) == (bool(modules) and not asked)


@pytest.mark.parametrize(
    "asked, kept",
    [(None, None), (["layernorm", "moe_act"], None), (["core_attn", "layernorm"], ["core_attn"])],
)
def test_without_transformer_engine_what_it_recomputes_is_dropped(
    asked: list[str] | None, kept: list[str] | None
) -> None:
    args = Namespace(**device.WITHOUT_FUSED_KERNELS | device.ON_CPU, reset_attention_mask=True)
    args.recompute_granularity, args.recompute_modules = "selective" if asked else None, asked
    line = device.adapt(args, "cpu")
    assert args.recompute_modules == kept
    assert args.recompute_granularity == ("selective" if kept else None)
    assert (line is None) == (asked is None) and "recompute_modules" in (line or "recompute_modules")


def test_only_extra_states_that_a_checkpoint_lacks_are_not_asked_for(dense: Path) -> None:
    from megatron_router_upcycling.training.patches.added_state import without_missing_states

    def state(key: str, layer: int, layers: int) -> ShardedObject:
        return ShardedObject(key, None, (layers,), (layer,))

    wanted: dict[str, Any] = {
        "norm": state("decoder.final_layernorm._extra_state", 0, 1),
        "attention": state("decoder.layers.self_attention.linear_qkv._extra_state", 1, 4),
        "weight": state("decoder.final_layernorm.weights", 0, 1),  # no extra state, so asked for
    }
    path = locate(dense)[1] / METADATA
    found = without_missing_states(
        {"model": wanted, "iteration": 3}, parse_metadata(read_record(path), path)[1]
    )
    del wanted["norm"]
    assert found == {"model": wanted, "iteration": 3}


@pytest.mark.parametrize(
    "graphs, modules, held",
    [
        ("none", [], False),
        ("local", [], True),  # whole layers
        ("local", [CudaGraphModule.attn], False),
        ("transformer_engine", [CudaGraphModule.attn, CudaGraphModule.moe_router], True),
        ("full_iteration", [], True),
    ],
)
def test_routers_in_cuda_graphs(graphs: str, modules: list[CudaGraphModule], held: bool) -> None:
    assert routers_in_cuda_graphs(Namespace(cuda_graph_impl=graphs, cuda_graph_modules=modules)) == held
