"""Time of a step, from what one took on a GPU, part by part.

Measured: Qwen1.5-0.5B as 8x0.5B with the mixture of routers, one rank of 64, one micro-batch of 4 x 4096
tokens, on one NVIDIA H200, without Transformer Engine and without communication (docs/performance.md has
hardware, versions and command). Pure: imports neither torch nor Megatron.
"""

from megatron_router_upcycling.planning import figures
from megatron_router_upcycling.planning.setup import Setup

MEASURED_ON = "one rank of an H200"
PEAK_TFLOPS = 989  # bfloat16, dense, of an H100 and an H200
TOKENS, LAYERS, D, F, V = 4 * 4096, 24, 1024, 2816, 151936
KERNEL_MS = {
    "experts": 65.8,
    "attention": 30.6,
    "projections": 15.8,
    "head and loss": 22.4,
    "gradients and optimizer": 10.2,
    "routers and dispatch": 4.6 + 3.1,
    "norms, rotary, residuals": 3.9 + 1.8 + 5.3 + 0.6,  # and the embedding
}
# What each part grows with, in the measured model.
WORK = {
    "experts": TOKENS * LAYERS * D * 2 * F,
    "attention": TOKENS * 4096 * LAYERS * D,
    "projections": TOKENS * LAYERS * 4 * D * D,
    "head and loss": TOKENS * D * V,
    "gradients and optimizer": 2_098_086_912,
    "routers and dispatch": TOKENS * D * LAYERS,
    "norms, rotary, residuals": TOKENS * D * LAYERS,
}
# A step over its kernels: where the host launches them in time (micro-batches of 8), and where not (4).
WALL_OVER_KERNELS = {"host keeps up": 339.8 / 314.7, "host falls behind": 219.4 / 164.0}


def kernel_ms(s: Setup) -> dict[str, float]:
    """Milliseconds of kernels of a micro-batch on one GPU, by part: the measured ones, scaled.

    Parts of products grow with their arithmetic, others with the hidden states that they read, and
    gradients with the parameters. Work is taken to be even over pipeline stages.
    """
    H, G, d = s.num_attention_heads, s.num_query_groups, s.kv_channels
    tokens = figures.tokens_on_gpu(s) / (s.tensor_model_parallel_size * s.pipeline_model_parallel_size)
    states = tokens * s.hidden_size
    work = {
        "experts": states * figures.ffn_widths(s) * (3 if s.swiglu else 2) / 3,
        "attention": tokens * s.seq_length * s.num_layers * H * d,
        "projections": states * s.num_layers * (2 * H + 2 * G) * d,
        "head and loss": states * s.padded_vocab_size,
        "gradients and optimizer": sum(figures.parameters(s, figures.fullest(s)).values()),
        "routers and dispatch": states * sum(s.has_experts()),
        "norms, rotary, residuals": states * s.num_layers,
    }
    return {part: KERNEL_MS[part] * amount / WORK[part] for part, amount in work.items()}


def step_seconds(setup: Setup, peak_tflops: float) -> dict[str, float]:
    """Time of a step by how well the host keeps up, on GPUs whose speed goes by their peak.

    Communication and recomputation are not in it.
    """
    kernels = sum(kernel_ms(setup).values()) / 1e3 * setup.num_microbatches * PEAK_TFLOPS / peak_tflops
    return {name: kernels * ratio for name, ratio in WALL_OVER_KERNELS.items()}
