"""What differs where fused kernels are missing, and which layers are captured in CUDA graphs."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_router_upcycling.checkpoint.format.files import locate, read_record
from megatron_router_upcycling.checkpoint.format.metadata import METADATA, parse_metadata
from megatron_router_upcycling.training import cuda_graphs, device

# Arguments of a run on a GPU, as far as they are read.
ARGS: dict[str, Any] = {name: known[0] for name, known in cuda_graphs.KNOWN.items()}
ARGS |= {"cuda_graph_impl": None, "num_experts": 8, "expert_model_parallel_size": 1}
ARGS |= {"expert_tensor_parallel_size": None}
ARGS |= {"micro_batch_size": 4, "eval_micro_batch_size": None, "moe_shared_expert_overlap": False}
ARGS |= {"distributed_backend": "nccl", "ddp_average_in_collective": True}
ARGS |= {"gradient_accumulation_fusion": False}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries that are found."""
    found = {"transformer_engine", device.APEX_EXTENSION}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    return found


def test_with_transformer_engine_only_apexs_kernel_is_missed(installed: set[str]) -> None:
    args = Namespace(**ARGS | {"gradient_accumulation_fusion": True, "cuda_graph_impl": "none"})
    assert device.adapt(args, "cuda") is None and args.gradient_accumulation_fusion
    args.distributed_backend = "gloo"  # which averages no gradients
    line = device.adapt(args, "cuda")
    assert line == "GPU with Transformer Engine: set ddp_average_in_collective=False"
    installed.remove(device.APEX_EXTENSION)
    assert device.adapt(args, "cuda") == "GPU without apex: set gradient_accumulation_fusion=False"
    assert args.moe_grouped_gemm and not args.gradient_accumulation_fusion


@pytest.mark.parametrize(
    "changes, impl, said",
    [
        ({}, "local", "set cuda_graph_impl=local"),
        ({"cuda_graph_impl": "none"}, "none", None),
        ({"cuda_graph_impl": "local", "recompute_granularity": "selective"}, "local", None),
        ({"expert_model_parallel_size": 8}, "local", "local, cuda_graph_modules=['attn', 'moe_router']"),
        ({"cuda_graph_impl": "local", "moe_grouped_gemm": False}, "local", "=['attn', 'moe_router']"),
        ({"tensor_model_parallel_size": 2}, "none", "not known to work with tensor_model_parallel_size=2"),
        ({"transformer_impl": "transformer_engine"}, "none", "with transformer_impl=transformer_engine"),
        ({"num_experts": None}, "none", "with num_experts=None"),
    ],
)
def test_graphs_are_chosen_and_named_unless_the_user_has(
    changes: dict[str, Any], impl: str, said: str | None, installed: set[str]
) -> None:
    args = Namespace(**ARGS | changes)
    line = device.adapt(args, "cuda")
    assert args.cuda_graph_impl == impl and args.ddp_average_in_collective
    assert line is None if said is None else line and line.endswith(said)


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
