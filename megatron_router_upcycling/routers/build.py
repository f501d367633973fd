"""Which class trains which kind of router."""

import importlib
from collections.abc import Callable
from functools import partial

from megatron.core.transformer.moe.router import TopKRouter

from megatron_router_upcycling.routers.config import RouterConfig


def builder(router: RouterConfig) -> Callable[..., TopKRouter]:
    """What ``MoESubmodules.router`` calls with (config, pg_collection, is_mtp_layer) to build a router."""
    place = router.kind.module
    if place is None:
        return TopKRouter
    module, name = place.split(":")
    return partial(getattr(importlib.import_module(module), name), router=router)
