"""Values drawn at random, block by block: a model from scratch, noise on experts, channels drawn anew.

Each block has a generator of its own, seeded by what the block is. Values therefore depend on the seed and on
the tensor alone, not on how the dense checkpoint is stored, and no more than a block is in memory.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator

import torch

BLOCK = 2**22  # elements


def generator(seed: int, *what: object) -> torch.Generator:
    """A generator for ``what``: names and numbers, whose text is hashed together with the seed."""
    text = ":".join(map(str, (seed, *what)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of blocks that make up ``shape``: rows of one matrix (the last two axes) each."""
    rows, columns = (1, *shape)[-2:]
    count = max(1, BLOCK // max(columns, 1))
    for front in itertools.product(*map(range, shape[:-2])):
        for row in range(0, rows, count):
            if len(shape) == 1:
                yield (0,), shape
            else:
                yield (*front, row, 0), (*(1 for _ in front), min(count, rows - row), columns)


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


def draw(
    seed: int, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], mean: float, std: float
) -> torch.Tensor:
    """One of the ``blocks`` of ``key``, in float32; N(mean, std), or all ``mean`` where std is 0."""
    values = torch.full(sizes, mean)
    return values if std == 0 else values.normal_(mean, std, generator=generator(seed, key, *offsets))
