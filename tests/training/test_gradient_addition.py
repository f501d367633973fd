"""The hook that adds a gradient to its buffer with our kernel, around Megatron's own hook."""

from types import SimpleNamespace
from typing import Any

import torch

from tests import launch


def test_a_gradient_is_added_once_and_leaves_no_mark() -> None:
    """A mark that stayed would make a CUDA graph that is captured later leave out the gradient."""
    launch.python("-c", "from tests.training import test_gradient_addition as t; t.check()").ok()


def check() -> None:
    from megatron_router_upcycling.training.patches import cpu_backend

    cpu_backend.install()
    from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel

    from megatron_router_upcycling.training.patches.layers import _add_gradients_faster

    for dtype in (torch.bfloat16, torch.float32):
        param: Any = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
        param.main_grad = torch.ones(3, 5)
        param.grad_added_to_main_grad = False
        ddp = SimpleNamespace(
            param_to_bucket_group={param: None}, ddp_config=SimpleNamespace(overlap_grad_reduce=False)
        )
        hook = _add_gradients_faster(DistributedDataParallel._make_backward_post_hook)(ddp, param)
        for micro_batch in range(1, 3):
            param.grad = torch.full((3, 5), 0.5, dtype=dtype)
            hook()
            assert param.grad is None and param.grad_added_to_main_grad is False
            assert torch.equal(param.main_grad, torch.full((3, 5), 1 + 0.5 * micro_batch))
        # What a layer has added itself is not added again.
        param.grad, param.grad_added_to_main_grad = torch.ones(3, 5, dtype=dtype), True
        hook()
        assert torch.equal(param.main_grad, torch.full((3, 5), 2.0)) and param.grad_added_to_main_grad
