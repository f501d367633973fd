"""Megatron on the CPU in this process, as the only rank."""

import torch


def start() -> None:
    """Call it before anything of Megatron is imported; a process does so once."""
    from megatron_router_upcycling.training.patches import cpu_backend, layers

    cpu_backend.install()
    layers.install_without_te()
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
