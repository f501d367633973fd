"""A Megatron router that computes its logits by its row in ``kinds.KINDS`` and inherits the rest."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_router_upcycling.layers import STACK
from megatron_router_upcycling.layers.routing import FusedRoutingRouter, ParameterHolder
from megatron_router_upcycling.routers.config import RouterConfig


class OwnParametersRouter(FusedRoutingRouter):
    """The parameters of ``router.kind``, in ``config.params_dtype``, and its logits.

    Replicated over all parallel groups, as the stock router's ``weight`` is. From scratch they are drawn with
    ``config.init_method``, except those for which the row has a constant.
    """

    # Megatron-FSDP knows the stock router as replicated by its class name, any other module by this.
    tensor_model_parallel = False

    def __init__(self, config: TransformerConfig, *args: Any, router: RouterConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert router.num_experts == config.num_moe_experts
        self.options = router
        # Without the stock gate, which would be a dead parameter in state dicts, DDP and the optimizer.
        self.register_parameter("weight", None)
        if not router.kind.has_bias:
            self.bias = None  # a parameter where linear layers have biases, else None already
        self.own = router.kind.parameters(router, config)
        for parameter in self.own:
            *modules, name = parameter.name.split(".")
            owner: torch.nn.Module = self
            for module in modules:
                if not hasattr(owner, module):
                    owner.add_module(module, ParameterHolder())
                owner = getattr(owner, module)
            empty = torch.empty(parameter.shape, dtype=torch.float32)
            owner.register_parameter(name, torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters and mark them for Megatron, as ``Router.reset_parameters`` does its own."""
        if not hasattr(self, "own"):
            return  # called by Router.__init__, for the stock gate
        constants = {parameter.name: parameter.constant for parameter in self.own}
        for name, parameter in self.named_parameters():
            if (constant := constants.get(name)) is not None:
                torch.nn.init.constant_(parameter, constant)
            elif self.config.perform_initialization:
                self.config.init_method(parameter)
            parameter.data = parameter.data.to(dtype=self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel
            setattr(parameter, STACK, parameter.dim() == 3)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., n] of tokens [..., D], in ``moe_router_dtype`` (default: the input's dtype)."""
        dtype = router_dtype(self.config, input)
        options, values = self.options, {parameter.name: self._read(parameter.name) for parameter in self.own}
        gate = options.kind.gate(values, options, self.config.hidden_size, dtype)
        logits = options.kind.logits(gate, input.to(dtype), options)
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def _read(self, name: str) -> Tensor:
        owner, _, last = name.rpartition(".")
        return self.get_submodule(owner)(last) if owner else getattr(self, last)


def router_dtype(config: TransformerConfig, input: Tensor) -> torch.dtype:
    """The dtype of logits: ``moe_router_dtype``, or the input's."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype, input.dtype)


def builder(router: RouterConfig) -> Callable[..., TopKRouter]:
    """The value of ``MoESubmodules.router``: builds a router of (config, pg_collection, is_mtp_layer)."""
    if router.kind.module is None:
        return TopKRouter
    module, name = router.kind.module.split(":")
    return partial(getattr(importlib.import_module(module), name), router=router)
