"""What a step took on a GPU, part by part: all that ``plan`` knows of time.

Qwen1.5-0.5B as 8x0.5B with the mixture of routers, one rank of 64, one micro-batch of 4 x 4096 tokens, on one
NVIDIA H200, without Transformer Engine (docs/performance.md has hardware, versions and command). Nothing of
it has communication in it.
"""

WHERE = "one rank of an H200"
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
KERNELS_MS = 164.0
# A step over its kernels: where the host launches them in time (micro-batches of 8), and where not (4).
WALL_OVER_KERNELS = {
    "host keeps up": 339.8 / 314.7,
    "host falls behind": 219.4 / KERNELS_MS,
}
