"""The module that ``--spec megatron_router_upcycling.layer_spec upcycled_layer_spec`` names."""

from megatron_router_upcycling.training.layer_spec import upcycled_layer_spec

__all__ = ["upcycled_layer_spec"]
