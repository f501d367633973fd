"""Measure the cost of the mixture of routers: forward and backward, compared with Megatron's stock router.

    .venv/bin/python tools/benchmarks/bench_router.py [--device cpu|cuda] [--threads 1 2] [--json]

Three routers of one size get the same tokens: the stock ``TopKRouter``; the folded router of this package,
which folds eq. 6-8 of the paper into one linear gate; and the direct form of eq. 6-8. Each pass is a whole
router as in training (softmax over all experts, top-k, auxiliary loss, z-loss) and its backward pass. Stock
and folded alternate, in reversed order in every other round, and the ratio is the median of the rounds'
ratios; the direct form, some twenty times slower, runs a few times at the end. Keep the machine idle.

On a GPU, launching the kernels takes most of the time of such a small pass, but not in a model with CUDA
graphs. There the ratio is of kernel time (by PyTorch's profiler), and launches are reported separately.
"""

import ctypes
import functools
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import measuring
import torch

from megatron_router_upcycling.routers.config import POOLINGS, RouterConfig
from megatron_router_upcycling.training import device, launch

BOUND = 1.05  # folded over stock
DIRECT_ROUNDS = 5
WARM_UP, PROFILED = 3, 10  # passes before profiling, and profiled passes
NUM_HEADS, HEAD_DIM = 16, 64  # Qwen1.5-0.5B
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_routers(options: Namespace, place: str) -> dict[str, torch.nn.Module]:
    """Build stock, folded and direct routers in a single Megatron process."""
    if place == "cpu":
        from megatron_router_upcycling.training.patches import cpu_backend

        cpu_backend.install()
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_router_upcycling.routers.kinds import keys_per_expert
    from megatron_router_upcycling.routers.mixture import MixtureRouter

    class DirectRouter(MixtureRouter):
        """Eq. 6-8 as written: every router's query, every score, then the pooling."""

        def gating(self, input: torch.Tensor) -> torch.Tensor:
            x = input.float()
            query = torch.einsum("mqd,sbd->sbmq", self.query_weight.float(), x)
            scores = query @ self.expert_key.float().T / math.sqrt(self.expert_key.shape[1])
            pooled = scores.sum(dim=2) if self.options.pooling == "sum" else scores.amax(dim=2)
            return pooled.unflatten(-1, (-1, keys_per_expert(self.options))).amax(dim=-1)

    torch.distributed.init_process_group(
        "gloo" if place == "cpu" else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden_size,
        num_attention_heads=NUM_HEADS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=options.hidden_size,
        moe_ffn_hidden_size=options.hidden_size,
        num_moe_experts=options.num_experts,
        moe_router_topk=2,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.02,
        moe_z_loss_coeff=0.001,
        add_bias_linear=False,
        params_dtype=DTYPES[options.dtype],
    )
    groups = get_default_pg_collection()
    sizes = {"num_experts": options.num_experts, "num_routers": options.num_routers}
    router = RouterConfig(**sizes, pooling=options.pooling)
    routers = {
        "stock": TopKRouter(config, groups),
        "folded": MixtureRouter(config, groups, router=router),
        "direct": DirectRouter(config, groups, router=router),
    }
    for made in routers.values():
        made.set_layer_number(1)
        made.to(place)
    return routers


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, as PyTorch's allocator does on a GPU.

    Otherwise the memory of the largest gradient is returned to the system in some passes but not in others,
    and mapping its pages again takes longer than the differences that are measured here.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum of glibc
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure(options: Namespace) -> dict[str, Any]:
    """Median seconds of a forward and backward pass, and ratios to the stock router, by number of threads."""
    place = device.choose(options.device)
    keep_freed_memory()
    routers = build_routers(options, place)
    tokens = torch.randn(options.tokens, 1, options.hidden_size, device=place, dtype=DTYPES[options.dtype])
    tokens.requires_grad_()
    grad_probs = torch.randn(options.tokens, options.num_experts, device=place)

    def seconds(name: str) -> float:
        router = routers[name]
        # Start without gradients: Megatron's data parallelism moves each to its buffer at once.
        tokens.grad = None
        router.zero_grad(set_to_none=True)
        start = measuring.now()
        probs, _ = router(tokens)
        probs.backward(grad_probs)
        return measuring.now() - start

    results: dict[str, Any] = {}
    profiled = routers if place == "cuda" else ()
    kernels = {name: profile(functools.partial(seconds, name)) for name in profiled}
    for threads in options.threads:
        torch.set_num_threads(threads)
        times = measuring.take_turns(seconds, ("stock", "folded"), options.rounds, warm_up=2)
        times["direct"] = [seconds("direct") for _ in range(1 + DIRECT_ROUNDS)][1:]
        medians = {name: statistics.median(values) for name, values in times.items()}
        found = {
            "seconds": medians,
            "ratio": statistics.median(measuring.ratios(times["folded"], times["stock"])),
            "direct_ratio": medians["direct"] / medians["stock"],
        }
        if kernels:
            folded, direct = (kernels[name]["ms"] / kernels["stock"]["ms"] for name in ("folded", "direct"))
            found |= {"kernels": kernels, "kernel_ratio": folded, "direct_kernel_ratio": direct}
        results[f"{threads} thread{'s' * (threads > 1)}"] = found
    return vars(options) | {"device": place, "bound": BOUND, "results": results}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds and number of the kernels of a pass on the GPU: means over ``PROFILED`` passes."""
    for _ in range(WARM_UP):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        for _ in range(PROFILED):
            run()
    durations = [kernel.duration for event in profiled.events() for kernel in event.kernels]  # microseconds
    return {"ms": sum(durations) / 1e3 / PROFILED, "launches": len(durations) / PROFILED}


def report(measured: dict[str, Any]) -> str:
    lines = [
        f"router forward + backward on {measured['device']}: {measured['tokens']} tokens,"
        f" D={measured['hidden_size']}, m={measured['num_routers']}, n={measured['num_experts']},"
        f" {measured['pooling']} pooling, {measured['dtype']}"
    ]
    for threads, result in measured["results"].items():
        if found := result.get("kernels"):
            times = (f"{name} {found[name]['ms']:.3f} ms in {found[name]['launches']:.0f}" for name in found)
            lines.append(
                f"  kernels and launches: {', '.join(times)}; folded {result['kernel_ratio']:.3f} times stock"
                f" (bound {BOUND}), direct {result['direct_kernel_ratio']:.1f} times"
            )
            threads = f"with launches, {threads}"
        bound = "" if found else f", bound {BOUND}"  # on a GPU the bound is on kernel time
        stock, folded, direct = (result["seconds"][name] * 1e3 for name in ("stock", "folded", "direct"))
        lines.append(
            f"  {threads}: stock {stock:.2f} ms, folded {folded:.2f} ms ({result['ratio']:.3f} times{bound}),"
            f" direct form {direct:.2f} ms ({result['direct_ratio']:.1f} times)"
        )
    return "\n".join(lines)


def main() -> None:
    parser = measuring.Parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default: 1 2)")
    for name, value in {"tokens": 4096, "hidden-size": 1024, "num-experts": 8, "num-routers": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--pooling", choices=POOLINGS, default="sum")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of tokens and parameters")
    parser.add_argument("--rounds", type=int, default=100, help="pairs of passes (default: 100)")
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")
    measured = measure(parser.parse_args())
    print(json.dumps(measured, indent=2) if measured["json"] else report(measured))


if __name__ == "__main__":
    launch.exit_on_user_error(main)
