"""What Megatron's training needs beside ``--cuda-graph-impl local``, to log and check what it does without.

Graphs are made at the end of the first step, after three passes over zeros that warm the layers up. Megatron
0.19 takes back what these add to its MoE metrics in layers of hybrid models only, not in those of GPT.

Its checks of losses and gradients (NaN, Inf, spikes) wait for the GPU one value at a time, so that the host,
which has little to do in a run in graphs, could never run ahead. Here they are all made at the end of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_router_upcycling.training.patches import patching

_waiting: list[tuple[torch.Tensor, Callable[[torch.Tensor], None]]] = []  # values, and what checks them


def install() -> None:
    """Wrap the end of a step's forward and backward passes, and Megatron's check of one value."""
    patching.wrap("graphs", schedules, "create_cudagraphs", _after_the_passes)
    reads = ("result", "rejection_func", "message", "comparison_func", "tolerance", "fatal")
    patching.wrap("graphs", RerunStateMachine, "validate_result", _later, reads)


def _later(validate: Callable[..., None], self: Any, result: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    kept = result.detach().clone()  # Megatron's schedule divides a loss in place afterwards
    _waiting.append((kept, lambda value: validate(self, value, *args, **kwargs)))


def _after_the_passes(create: Callable[[], Any]) -> Any:
    """Check what was found in the passes, then make the graphs if there are none yet."""
    checks = _waiting.copy()
    _waiting.clear()
    if checks:
        values = torch.stack([value.reshape(()).float() for value, _ in checks]).cpu()  # waits once
        for value, (_, check) in zip(values, checks, strict=True):
            check(value)
    metrics = get_moe_metrics_tracker().metrics
    before = {name: entry.values.clone() for name, entry in metrics.items()}
    created = create()
    for name, values in before.items():
        metrics[name].values.copy_(values)
    return created
