"""Values drawn at random, block by block: a model from scratch, noise on experts, channels drawn anew.

Each block has a generator of its own, seeded by what the block is. Values therefore depend on the seed and on
the tensor alone, not on how the dense checkpoint is stored, and no more than a block is in memory.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape

BLOCK = 2**22  # elements


def generator(seed: int, *what: object) -> torch.Generator:
    """A generator for ``what``: names and numbers, whose text is hashed together with the seed."""
    text = ":".join(map(str, (seed, *what)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def blocks(shape: Shape, part: Box | None = None) -> Iterator[Box]:
    """The blocks that make up a tensor of ``shape``, or those of them that overlap ``part``.

    Each is a run of rows of one matrix (the last two axes).
    """
    if len(shape) == 1:
        yield Box((0,), shape)
        return
    *front, rows, columns = shape
    part = part or Box((0,) * len(shape), shape)
    step = max(1, BLOCK // max(columns, 1))
    for matrix in itertools.product(*map(range, part.offsets[:-2], part.ends[:-2])):
        for row in range(part.offsets[-2] // step * step, part.ends[-2], step):
            yield Box((*matrix, row, 0), (*(1 for _ in front), min(step, rows - row), columns))


def first_values(key: str, std: float, num_layers: int, centered_norms: bool) -> tuple[float, float]:
    """Mean and standard deviation that Megatron draws a GPT model's parameter ``key`` with.

    Norms are 1 (or 0, where Megatron adds the 1), biases 0, weights N(0, ``std``), those of output
    projections divided by sqrt(2L).
    """
    if key.endswith("norm.weight") or "norm_weight" in key:
        return (0.0, 0.0) if centered_norms else (1.0, 0.0)
    if key.endswith("bias"):
        return 0.0, 0.0
    if ".linear_proj." in key or ".linear_fc2." in key:
        return 0.0, std / math.sqrt(2 * num_layers)
    return 0.0, std


def draw(seed: int, key: str, block: Box, mean: float, std: float) -> torch.Tensor:
    """One of the ``blocks`` of ``key``, in float32; N(mean, std), or all ``mean`` where std is 0."""
    values = torch.full(block.sizes, mean)
    return values if std == 0 else values.normal_(mean, std, generator=generator(seed, key, *block.offsets))
