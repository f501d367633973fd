"""Compiles each kernel for Hopper (sm_90), which needs no GPU: ``test_kernels.py`` runs this file.

Triton's interpreter takes much that its compiler refuses. Nothing is launched, so results are what memory
held. Prints each kernel with the bytes of shared memory that a block of it takes (Hopper has 227 KiB).
"""

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_router_upcycling.layers import kernels
from megatron_router_upcycling.layers.kernels import (
    accumulate,
    cross_entropy,
    fold,
    gate,
    norm,
    permutation,
    rotary,
    routing,
    swiglu,
)

T, D, F, N, K = 256, 1024, 2816, 8, 2  # a little of the paper's run


def pretend() -> None:
    place = {"current_target": GPUTarget("cuda", 90, 32), "current_device": 0, "current_stream": 0}
    driver.set_active(SimpleNamespace(**{f"get_{n}": lambda *_, v=v: v for n, v in place.items()}))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(f"{self.__name__}: {compiled.metadata.shared}", flush=True)
        return compiled

    JITFunction.run = compile_only
    kernels.usable = lambda *tensors: True


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def back(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])


def main() -> None:
    pretend()
    back(swiglu.weighted_swiglu(draw(T, 2 * F), draw(T, dtype=torch.float32)))
    normed, residual = norm.rms_norm(draw(T, D), draw(D), 1e-6)
    back(normed, residual)
    back(norm.rms_norm(draw(T, D), draw(D), 1e-6)[0])
    back(rotary.rotate(draw(T, 2, 4, 64), torch.zeros(T, 1, 1, 64)))
    back(cross_entropy.cross_entropy(draw(T, 4096) * 1, torch.zeros(T, dtype=torch.long)))
    back(fold.fold_sum(draw(8, 128, D), draw(N, 128)))
    back(gate.gate_logits(draw(T, D), draw(N, D, dtype=torch.float32)))
    for pre_softmax in (True, False):
        found = routing.route(draw(T, N, dtype=torch.float32), K, pre_softmax)
        back(found.probs, found.sums)
    element = torch.zeros(())
    for log in (element, None):
        routing.losses(found.sums.detach(), found.sums[:N].detach(), *(routing.Loss(0.1, 0.1, log),) * 2)
    places = permutation.find_places(torch.zeros(T, N, dtype=torch.bool), K)
    for part in places:
        part.zero_()
    rows, probs = permutation.permute(draw(T, D), draw(T, N, dtype=torch.float32), places)
    back(permutation.combine(rows, places), probs)
    total, part = torch.zeros(T, D), torch.zeros(T, D, dtype=torch.bfloat16)
    for fresh in (None, torch.zeros((), dtype=torch.int32)):
        accumulate.add_(total, part, fresh)


if __name__ == "__main__":
    main()
