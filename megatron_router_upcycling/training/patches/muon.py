"""Let Muon take each matrix of a stack for itself: experts, and the query maps of a mixture of routers.

Megatron gives Muon what has two axes and is neither embedding nor output layer, and the rest to AdamW.
Grouped experts [n, out, in] and query maps [m, d', D] are marked with ``layers.STACK``: they count as
matrices, and the update of each is orthogonalised alone, as Muon does to experts that are stored one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import emerging_optimizers, layer_wise_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_router_upcycling.layers import STACK
from megatron_router_upcycling.training.patches import patching


def install() -> None:
    """Replace Megatron's rule of which parameters are matrices, and wrap Muon's orthogonalisation."""
    entries = patching.find("muon", emerging_optimizers, "_EMERGING_OPTIMIZERS")
    others = ParamKey(predicate=ParamPredicate(name="no_matrix", fn=lambda param: not is_matrix(param)))
    entries["muon"].default_param_overrides = {others: {"optimizer": "adam"}}
    for owner in (layer_wise_optimizer, optimizer):
        patching.replace("muon", owner, "is_managed_by_layer_wise_optimizer", is_matrix)
    patching.wrap("muon", emerging_optimizers.TensorParallelMuon, "orthogonalize", _each_alone)


def is_matrix(param: torch.Tensor) -> bool:
    """Whether ``param`` is a matrix, or a stack of them, that Muon updates."""
    axes = 3 if getattr(param, STACK, False) else 2
    return param.dim() == axes and not getattr(param, "is_embedding_or_output_parameter", False)


def _each_alone(
    orthogonalize: Callable[..., torch.Tensor], self: Any, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    if grad.dim() == 2:
        return orthogonalize(self, p, grad, **kwargs)
    return torch.stack([orthogonalize(self, p, matrix, **kwargs) for matrix in grad])
