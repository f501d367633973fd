"""Write our routers' weights into Megatron's routing trace (``--moe-routing-trace-dump-weights``).

The trace reads a router's ``weight`` [n, D], which ours have not. It gets what their logits are computed
from, folded: the mixture's ``weight`` is one gate [n, D], or several below each other where an expert takes
their maximum, and the MLP router's stands beside ``hidden.weight`` [D, D].
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.router_trace import RouterTracer

from megatron_router_upcycling.routers.base import OwnParametersRouter
from megatron_router_upcycling.training.patches import patching

READ = ("config", "topk", "expert_bias", "layer_number", "gating")  # of a router, beside its weight


def install() -> None:
    """Wrap ``RouterTracer._record``."""
    patching.wrap("router_trace", RouterTracer, "_record", _with_folded_weights)


def _with_folded_weights(record: Callable[..., None]) -> Callable[..., None]:
    @torch.no_grad()
    def call(self: Any, module: Any, *args: Any) -> None:
        if not (self.dump_router_weights and isinstance(module, OwnParametersRouter)):
            return record(self, module, *args)
        folded, seen = module.folded(torch.float32), len(self._router_state)
        shown = SimpleNamespace(weight=folded["weight"], **{name: getattr(module, name) for name in READ})
        record(self, shown, *args)
        if len(self._router_state) > seen:
            others = {name: value.cpu().clone() for name, value in folded.items() if name != "weight"}
            next(reversed(self._router_state.values())).update(others)

    return call
