"""A layer whose attention and router are captured in CUDA graphs, each by itself, and whose experts are not.

For experts on several ranks, where dispatch waits for the host. Megatron-Core 0.19 captures parts of a layer
in hybrid models, whose layers are attention or experts; a GPT's layer it captures whole, whatever
``--cuda-graph-modules`` says.
"""

from typing import Any

from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


class PartlyCapturedLayer(TransformerLayer):
    """Megatron's layer; ``config.cuda_graph_modules`` says which of its parts are captured."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert not hasattr(self, "cudagraph_manager"), "this Megatron captures the whole layer all the same"
        parts: list[tuple[CudaGraphModule, Any, str]] = [(CudaGraphModule.attn, self, "_forward_attention")]
        if isinstance(self.mlp, MoELayer):
            parts.append((CudaGraphModule.moe_router, self.mlp, "route"))
        for part, owner, name in parts:
            if part in config.cuda_graph_modules:
                # A submodule, so that it knows whether the model trains; it replaces the method.
                owner.add_module(f"cudagraph_manager{name}", CudaGraphManager(config, owner, name))

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """Megatron's constructor calls this to capture the whole layer."""
