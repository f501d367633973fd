"""More names in the MoE metrics that Megatron logs (console, TensorBoard, W&B).

``training_log`` hands ``MoEMetricsTracker.report`` a fixed list of names; what a router records under others
would be dropped.
"""

import functools
import inspect
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

_names: list[str] = []


def report_also(name: str) -> None:
    """Let Megatron report the metric ``name`` as well, on every rank from now on.

    Raises:
        RuntimeError: ``MoEMetricsTracker.report`` does not take ``track_names``.
    """
    if name in _names:
        return
    _names.append(name)
    if len(_names) > 1:
        return
    report = MoEMetricsTracker.report
    if "track_names" not in inspect.signature(report).parameters:
        raise RuntimeError(
            "routers.metrics: megatron.core.transformer.moe.moe_logging.MoEMetricsTracker.report takes no"
            " track_names; tested with megatron-core 0.19"
        )

    @functools.wraps(report)
    def call(self: MoEMetricsTracker, *args: Any, track_names: Any = None, **kwargs: Any) -> str:
        if track_names is not None:
            given = [track_names] if isinstance(track_names, str) else track_names
            track_names = [*given, *(name for name in _names if name not in given)]
        return report(self, *args, track_names=track_names, **kwargs)

    MoEMetricsTracker.report = call  # type: ignore[method-assign]
