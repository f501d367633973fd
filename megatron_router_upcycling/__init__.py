"""Router Upcycling for Megatron-LM: dense language models to Mixture-of-Experts (arXiv 2509.00679).

    from megatron_router_upcycling import RouterConfig, convert_checkpoint, verify_checkpoint

    convert_checkpoint("ckpt/dense", "ckpt/moe", RouterConfig(num_experts=8), "ckpt/key_stats.safetensors")
    assert not verify_checkpoint("ckpt/dense", "ckpt/moe")

The names below are public. The first use of one imports PyTorch; none of them imports Megatron.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_router_upcycling.api import (
        Router,
        RouterConfig,
        UserError,
        add_experts,
        convert_checkpoint,
        inspect_checkpoint,
        load_router,
        verify_checkpoint,
    )

__version__ = "0.2.0"
__all__ = ["Router", "RouterConfig", "UserError", "add_experts", "convert_checkpoint"]
__all__ += ["inspect_checkpoint", "load_router", "verify_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_router_upcycling import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
