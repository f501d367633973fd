"""What routers with parameters of their own have in common, in place of Megatron's linear gate."""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class OwnParametersRouter(TopKRouter):
    """A ``TopKRouter`` whose constructor replaces ``weight`` and then calls ``reset_parameters`` again.

    Its parameters are replicated over all parallel groups, as the stock router's ``weight`` is.
    """

    # Megatron-FSDP knows the stock router as replicated by its class name, any other module by this.
    tensor_model_parallel = False

    def reset_parameters(self) -> None:
        """Draw the parameters and mark them for Megatron, as ``Router.reset_parameters`` does its own."""
        if self.weight is not None:
            return  # Router.__init__ calls this for the gate that goes at once
        for parameter in self.parameters():
            if self.config.perform_initialization:
                self.config.init_method(parameter)
            parameter.data = parameter.data.to(dtype=self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel


def router_dtype(config: TransformerConfig, input: Tensor) -> torch.dtype:
    """The dtype of logits: ``moe_router_dtype``, or the input's."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype, input.dtype)
