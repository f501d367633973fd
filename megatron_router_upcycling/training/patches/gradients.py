"""How gradients get into the buffers of Megatron's DistributedDataParallel (DDP), on a GPU.

The first micro-batch of a step writes its gradients and the others add theirs, so buffers need not be zeroed.
A CUDA graph holds the addition of its own layers' gradients, one for all micro-batches: there a tensor says
whether the micro-batch is the first.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import distributed_data_parallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.cuda_graphs import _CudaGraphRunner
from torch import Tensor

from megatron_router_upcycling.layers.kernels import accumulate
from megatron_router_upcycling.training.patches import patching

# With these Megatron adds gradients by itself, or has other buffers or another schedule.
OTHERS = (
    *("gradient_accumulation_fusion", "defer_embedding_wgrad_compute", "delay_wgrad_compute"),
    *("use_megatron_fsdp", "use_torch_fsdp2", "reuse_grad_buf_for_mxfp8_param_ag"),
    "overlap_moe_expert_parallel_comm",
)


class _Step:
    """Which gradients a step has written so far."""

    def __init__(self) -> None:
        self.params: list[torch.nn.Parameter] = []
        self.in_graphs: set[torch.nn.Parameter] = set()  # their gradients are added by a CUDA graph
        self.written: set[torch.nn.Parameter] = set()
        self.first = False  # whether this is the first micro-batch's backward pass, or before it
        self.fresh: Tensor | None = None  # int32 []: ``first``, on the device

    def set_first(self, first: bool) -> None:
        if self.fresh is None:
            device = self.params[0].main_grad.device  # type: ignore[attr-defined]
            self.fresh = torch.zeros((), dtype=torch.int32, device=device)
        if self.first != first:
            self.fresh.fill_(first)
        self.first = first
        self.written.clear()


def install(args: Namespace) -> None:
    """Wrap DDP's hook that adds a gradient, and where nothing else adds any, the zeroing of its buffers."""
    step = _Step()

    def hook(original: Callable[..., Any], self: Any, param: torch.nn.Parameter) -> Callable[..., None]:
        return _hook(step, original(self, param), param)

    ddp = distributed_data_parallel.DistributedDataParallel
    patching.wrap("gradients", ddp, "_make_backward_post_hook", hook)
    patching.wrap("gradients", _CudaGraphRunner, "create_bwd_graph", _capture(step))
    if args.pipeline_model_parallel_size == 1 and not any(getattr(args, name) for name in OTHERS):
        patching.wrap("gradients", _ParamAndGradBuffer, "reset", lambda zero, self: step.set_first(True))
        patching.wrap("gradients", schedules, "backward_step", _then_add(step))


def _hook(step: _Step, original: Callable[..., None], param: Any) -> Callable[..., None]:
    """Write or add ``param.grad``; ``original`` then does the rest, such as to start its reduction."""

    def call(*unused: Any) -> None:
        if distributed_data_parallel.is_graph_capturing():
            return original(*unused)
        first = step.first and param not in step.written
        step.written.add(param)
        added = param.grad_added_to_main_grad
        if param.grad is None and first and param not in step.in_graphs:
            param.main_grad.zero_()
        elif param.grad is not None and not added:
            accumulate.add_(param.main_grad, param.grad.data, step.fresh if first else None)
            param.grad_added_to_main_grad = True  # so that the original adds nothing
        original(*unused)
        # A CUDA graph captured later would take a mark that stayed to mean that the layer itself adds.
        param.grad_added_to_main_grad = added

    step.params.append(param)
    return call


def _capture(step: _Step) -> Callable[..., Any]:
    """Add the gradients that a graph's backward pass finds, just before Megatron would in the same graph."""

    def call(create: Callable[..., Any], runner: Any) -> Any:
        differentiate, added = torch.autograd.grad, []

        def and_add(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
            torch.autograd.grad = differentiate  # also for what it calls
            found = differentiate(*args, **kwargs)
            params = runner.params_to_backprop
            for param, grad in zip(params, found[len(found) - len(params) :], strict=True):
                if grad is not None and not param.grad_added_to_main_grad:
                    accumulate.add_(param.main_grad, grad, step.fresh)
                    param.grad_added_to_main_grad = True  # so that Megatron's graph adds nothing
                    added.append(param)
            return found

        torch.autograd.grad = and_add  # type: ignore[assignment]
        try:
            return create(runner)
        finally:
            torch.autograd.grad = differentiate
            step.in_graphs.update(added)
            for param in added:  # of which there may be another graph
                param.grad_added_to_main_grad = False

    return call


def _then_add(step: _Step) -> Callable[..., Any]:
    def call(backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = backward(*args, **kwargs)
        if step.first:
            for param in step.params:
                if param not in step.written:  # it had no part in this micro-batch
                    param.main_grad.zero_()  # type: ignore[attr-defined]
            step.set_first(False)
        return found

    return call
