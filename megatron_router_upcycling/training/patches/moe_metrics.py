"""More names in the MoE metrics that Megatron logs (console, TensorBoard, W&B).

``training_log`` hands ``MoEMetricsTracker.report`` a fixed list of names; what a router records under others
would be dropped.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from megatron_router_upcycling.training.patches import patching

_names: list[str] = []


def report_also(name: str) -> None:
    """Let Megatron report the metric ``name`` as well, on every rank from now on."""
    patching.wrap("moe_metrics", MoEMetricsTracker, "report", _with_more_names, reads=("track_names",))
    if name not in _names:
        _names.append(name)


def _with_more_names(report: Callable[..., str]) -> Callable[..., str]:
    def call(self: MoEMetricsTracker, *args: Any, track_names: Any = None, **kwargs: Any) -> str:
        if track_names is not None:
            given = [track_names] if isinstance(track_names, str) else track_names
            track_names = [*given, *(name for name in _names if name not in given)]
        return report(self, *args, track_names=track_names, **kwargs)

    return call
