"""Each Triton kernel against its plain form, in Triton's interpreter: ``test_kernels.py`` runs this file.

Usage: ``TRITON_INTERPRET=1 python -m tests.layers.kernel_checks`` prints a line for each check, with what
went wrong or ok. On a machine with a GPU, ``python -m tests.layers.kernel_checks cuda`` runs the compiled
kernels.
"""

import functools
import importlib.metadata
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

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
from megatron_router_upcycling.routers.fold import fold as plain_fold

VERSIONS = [Version(importlib.metadata.version(name)) for name in ("triton", "numpy") if kernels.INSTALLED]
# PyTorch 2.11 brings Triton 3.6.
BEFORE = "Triton's interpreter before 3.7 cannot run loops with NumPy 2.4 or later: install numpy<2.4"
CANNOT = BEFORE if VERSIONS and VERSIONS[0] < Version("3.7") and VERSIONS[1] >= Version("2.4") else None
DEVICE = "cuda" if "cuda" in sys.argv else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def routing_map(tokens: int, experts: int, top_k: int, idle: int = 0) -> Tensor:
    """The last ``idle`` experts are chosen by no token."""
    scores = draw(tokens, experts, seed=3)
    if idle:
        scores[:, -idle:] = -9
    chosen = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """Outputs and the gradients of the inputs under random incoming gradients, all in float64."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = [output.detach().double().clone() for output in outputs]
    weights = [draw(*output.shape, seed=7).to(output.dtype) for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return results + [grad.double() for grad in grads]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, (number, a.shape, b.shape)
        assert a.isfinite().all(), f"value {number} is not finite"
        error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"value {number}: relative error {error:.2e}, more than {tolerance:.0e}"


def agree(fast: Any, plain: Any, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """``fast`` and its gradients are those of ``plain`` in float64."""
    compare(gradients(fast, *inputs), gradients(plain, *(value.double() for value in inputs)), tolerance)


def check_swiglu() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        inputs = draw(33, 2 * 1100, dtype=dtype), draw(33).sigmoid()
        agree(swiglu.weighted_swiglu, swiglu.plain, inputs, tolerance)


def check_places() -> None:
    for tokens, experts, top_k, idle in ((4200, 8, 2, 0), (1, 8, 2, 0), (129, 5, 1, 2), (64, 16, 16, 0)):
        chosen = routing_map(tokens, experts, top_k, idle)
        found = permutation.find_places(chosen, top_k)
        plain = permutation._find_places_plainly(chosen, top_k)
        for name in ("row_of", "token_of", "counts"):
            assert torch.equal(getattr(found, name).int(), getattr(plain, name).int()), (name, tokens)
        expert, token = chosen.t().nonzero(as_tuple=True)
        assert torch.equal(found.token_of.long(), token)
        assert torch.equal(found.counts.long(), expert.bincount(minlength=experts))


def check_permutation() -> None:
    for tokens, experts, top_k, idle in ((150, 8, 2, 0), (7, 6, 3, 2)):
        chosen = routing_map(tokens, experts, top_k, idle)
        places = permutation.find_places(chosen, top_k)
        expert, token = chosen.t().nonzero(as_tuple=True)
        inputs = draw(tokens, 2100), draw(tokens, experts).sigmoid() * chosen
        permute = functools.partial(permutation.permute, places=places)
        agree(permute, lambda h, p, at=token, of=expert: (h[at], p[at, of]), inputs, 1e-6)
        combine = functools.partial(permutation.combine, places=places)
        empty = torch.zeros(tokens, 2100, dtype=torch.float64, device=DEVICE)
        add = functools.partial(empty.index_add, 0, token)
        agree(combine, add, (draw(tokens * top_k, 2100, seed=5),), 1e-6)


def check_gate() -> None:
    for count, rows, hidden in ((130, 8, 200), (2100, 3, 72), (130, 64, 64)):
        tokens, weight = draw(count, hidden, dtype=torch.bfloat16), draw(rows, hidden, scale=0.02)
        exact = gradients(lambda x, a: x @ a.t(), tokens.double(), weight.double())
        found = gradients(gate.gate_logits, tokens, weight)
        compare(found[:1] + found[2:], exact[:1] + exact[2:], 1e-6)  # logits and the gate's gradient
        compare(found[1:2], exact[1:2], 4e-3)  # rounded to the tokens' bfloat16


def check_routing() -> None:
    for tokens, experts, top_k in ((100, 8, 2), (5, 6, 3), (65, 16, 1)):
        for pre_softmax in (True, False):
            logits = draw(tokens, experts, scale=2.0)
            logits[0] = 0.5  # all equal: the first are chosen
            of = {"top_k": top_k, "pre_softmax": pre_softmax}

            def run(route: Any, x: Tensor, of: Any = of) -> tuple[Tensor, ...]:
                found = route(x, **of)
                return found.probs, found.sums

            fast, plain = (functools.partial(run, route) for route in (routing.route, routing.plain))
            compare(gradients(fast, logits), gradients(plain, logits), 2e-6)
            compare_losses(routing.route(logits, **of))
            maps = [route(logits, **of).routing_map for route in (routing.route, routing.plain)]
            assert torch.equal(*maps) and (maps[0].sum(1) == top_k).all()


def compare_losses(found: routing.Routing) -> None:
    sums, load = found.sums, found.load
    for balanced, z_logged in ((True, True), (True, False), (False, True)):
        results = []
        for kind in (torch.float32, torch.float64):
            logs = [torch.ones((), device=DEVICE, dtype=kind) for _ in range(2)]
            balance = routing.Loss(0.02, 0.5, logs[0]) if balanced else routing.Loss()
            z = routing.Loss(0.3, 0.1, logs[1] if z_logged else None)
            usable = kernels.usable
            if kind is torch.float64:
                kernels.usable = lambda *tensors: False
            try:
                slopes = routing.losses(sums.to(kind), load.to(kind), balance, z)
            finally:
                kernels.usable = usable
            results.append([slopes.double(), *(log.double() for log in logs)])
        compare(*results, 1e-6)


def check_cross_entropy() -> None:
    labels = torch.arange(9, device=DEVICE) * 2222
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        logits = draw(9, 20000, dtype=dtype, scale=3.0)
        exact = functools.partial(torch.nn.functional.cross_entropy, target=labels, reduction="none")
        # It overwrites its logits.
        agree(lambda x: cross_entropy.cross_entropy(x * 1, labels), exact, (logits,), tolerance)


def check_rotary() -> None:
    for d, r in ((16, 16), (24, 16)):
        angles = draw(5, 1, 1, r).abs()
        fast, plain = (
            lambda x, rotate=rotate, d=d, angles=angles: rotate(x[..., d:], angles)
            for rotate in (rotary.rotate, rotary.plain)
        )
        fused = draw(5, 2, 3, 2 * d)
        compare(gradients(fast, fused), gradients(plain, fused), 1e-6)


def check_norm() -> None:
    norm.PROGRAMS = 8  # so that each has several tokens, as in a large batch
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        inputs = draw(21, 2, 72, dtype=dtype), draw(72, dtype=dtype) + 1
        for uses in ((0,), (0, 1), (1,)):  # the norm, the residual

            def fast(x: Tensor, w: Tensor, uses: Any = uses) -> tuple[Tensor, ...]:
                return tuple(norm.rms_norm(x, w, 1e-6)[use] * 1 for use in uses)

            def plain(x: Tensor, w: Tensor, uses: Any = uses) -> tuple[Tensor, ...]:
                found = torch.nn.functional.rms_norm(x, (72,), w, 1e-6), x + 0 * w.sum()
                return tuple(found[use] for use in uses)

            agree(fast, plain, inputs, tolerance)


def check_fold() -> None:
    plain = functools.partial(plain_fold, pooling="sum", dtype=torch.float64)
    for m, width, n, D in ((8, 48, 8, 100), (1, 16, 5, 33)):
        agree(fold.fold_sum, plain, (draw(m, width, D), draw(n, width)), 2e-6)


def check_accumulate() -> None:
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 6e-3)):
        part = draw(7, 900, dtype=torch.bfloat16, seed=1)
        for fresh in (None, 0, 1):
            total = draw(7, 900, dtype=dtype)
            expected = part.to(dtype) if fresh else total + part
            if fresh:
                total[2, 3] = float("nan")  # of a step that failed
            flag = None if fresh is None else torch.tensor(fresh, dtype=torch.int32, device=DEVICE)
            accumulate.add_(total, part, flag)
            compare([total], [expected], tolerance)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def main() -> None:
    if CANNOT and DEVICE == "cpu":
        sys.exit(f"error: {CANNOT}")
    assert kernels.usable(torch.zeros(1, device=DEVICE)), "the kernels would not run: set TRITON_INTERPRET=1"
    for name, check in CHECKS.items():
        try:
            check()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{name}: {type(error).__name__} at line {where.lineno}: {str(error)[:1500]}", flush=True)
        else:
            print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
