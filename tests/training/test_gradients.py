"""Gradients that are written first and then added, in Megatron's DDP, against its own clearing and adding."""

from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from tests import launch
from tests.layers import one_rank

STEPS, MICRO_BATCHES = 3, 3


@pytest.mark.parametrize("fused", [False, True], ids=["written first", "only added"])
def test_buffers_hold_what_megatrons_own_do(fused: bool) -> None:
    """In a process of its own: symbols stay replaced."""
    launch.python("-c", f"from tests.training import test_gradients as t; t.compare({fused})").ok()


class Ignore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class Model(torch.nn.Module):
    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        names = ("always", "twice", "early", "late", "never")
        self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in names})
        for number, part in enumerate(self.parts.values()):
            torch.nn.init.normal_(part.weight, generator=torch.Generator().manual_seed(number))
        self.to(dtype)

    def forward(self, x: torch.Tensor, micro_batch: int) -> torch.Tensor:
        parts = self.parts
        x = parts["twice"](parts["always"](parts["twice"](x)))
        if micro_batch == 0:
            x = Ignore.apply(x, parts["late"].weight)  # DDP's hook is called, and there is no gradient
        if micro_batch != 1:
            x = parts["early" if micro_batch == 0 else "late"](x)
        # A backward pass in the backward pass: its gradient arrives apart from that of the first uses.
        return torch.utils.checkpoint.checkpoint(parts["twice"], x, use_reentrant=True)


def compare(fused: bool) -> None:
    one_rank.start()
    from megatron.core.pipeline_parallel import schedules

    from megatron_router_upcycling.training.patches import gradients

    kinds = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
    expected = [train(*kind) for kind in kinds]
    assert all(float(values.abs().sum()) > 0 for kind in expected for values in kind)
    before = schedules.backward_step
    flags = dict.fromkeys(gradients.OTHERS, False) | {"gradient_accumulation_fusion": fused}
    gradients.install(Namespace(pipeline_model_parallel_size=1, **flags))
    assert (schedules.backward_step is before) == fused
    for kind, values in zip(kinds, expected, strict=True):
        found = train(*kind)
        assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True)), kind


def train(dtype: torch.dtype, in_float32: bool) -> list[torch.Tensor]:
    """The gradient buffers after each of three steps, whose values before a step are of no consequence."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import schedules

    config = one_rank.config()
    setup = DistributedDataParallelConfig(grad_reduce_in_fp32=in_float32, overlap_grad_reduce=False)
    model = DistributedDataParallel(config, setup, Model(config, dtype))
    inputs = torch.randn(STEPS, MICRO_BATCHES, 4, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = []
    for step in inputs:
        model.zero_grad_buffer()
        for number, x in enumerate(step):
            loss = model(x.requires_grad_(), number).float().square().mean()
            schedules.backward_step(None, loss, None, config)
        assert all(param.grad is None for param in model.parameters())
        assert not any(param.grad_added_to_main_grad for param in model.parameters())
        found += [buffer.grad_data.clone() for buffer in model.buffers]
        for buffer in model.buffers:  # what a reduction between ranks leaves there is of no use either
            buffer.grad_data.mul_(3)
    return found
