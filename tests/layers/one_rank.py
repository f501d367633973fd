"""Megatron on the CPU in this process, as the only rank."""

from typing import Any

import torch

D = 32


def start() -> None:
    """Call it before anything of Megatron is imported; a process does so once."""
    from megatron_router_upcycling.training.patches import cpu_backend, layers

    cpu_backend.install()
    layers.install_without_te()
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def config(**changes: Any) -> Any:
    """Of one layer with SwiGLU and without biases."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {"num_layers": 1, "hidden_size": D, "num_attention_heads": 4}
    values |= {"ffn_hidden_size": 16, "add_bias_linear": False}
    values |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    return TransformerConfig(**values | {"bias_activation_fusion": False} | changes)
