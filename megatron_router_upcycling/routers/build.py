"""Which class trains which kind of router."""

from collections.abc import Callable
from functools import partial

from megatron.core.transformer.moe.router import TopKRouter

from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.routers.baselines import (
    DROPPED,
    LOCAL,
    LOCALITY,
    LocMoERouter,
    MLPRouter,
    SwitchRouter,
)
from megatron_router_upcycling.routers.mixture import MixtureRouter

BUILDERS: dict[str, Callable[[RouterConfig], Callable[..., TopKRouter]]] = {
    "mixture": lambda router: partial(MixtureRouter, router=router),
    "linear": lambda router: TopKRouter,
    "mlp": lambda router: MLPRouter,
    "switch": lambda router: SwitchRouter,
    "locmoe": lambda router: partial(LocMoERouter, router=router),
}

METRICS = {"switch": (DROPPED,), "locmoe": (LOCALITY, LOCAL)}  # recorded beside Megatron's own metrics


def builder(router: RouterConfig) -> Callable[..., TopKRouter]:
    """What ``MoESubmodules.router`` calls with (config, pg_collection, is_mtp_layer) to build a router."""
    return BUILDERS[router.router](router)
