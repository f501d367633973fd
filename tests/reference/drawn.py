"""What is drawn at random. The rule: PyTorch's normal generator on the CPU, in float32; its seed is the first
eight bytes, little-endian, of SHA-256 of "seed:what:what:...". A tensor's matrices (its last two axes) are
drawn in runs of rows of at most ``MOST_ELEMENTS`` elements, each named by the tensor and its offsets."""

import hashlib
import math
from argparse import Namespace

import numpy as np
import torch

MOST_ELEMENTS = 4194304


def generator(seed: int, *what: object) -> torch.Generator:
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    made = torch.Generator()
    made.manual_seed(int.from_bytes(digest[:8], "little"))
    return made


def normal(shape: tuple[int, ...], random: torch.Generator, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=random)


def megatron_std(key: str, args: Namespace) -> float | int:
    """The standard deviation of a weight; the int 0 or 1 for a parameter that is constant."""
    module, parameter = key.rsplit(".", 1)
    if parameter in ("bias", "layer_norm_bias"):
        return 0
    if parameter == "layer_norm_weight" or module.endswith("layernorm"):
        return 0 if getattr(args, "layernorm_zero_centered_gamma", False) else 1
    if module.endswith(("linear_proj", "linear_fc2")):
        return args.init_method_std / math.sqrt(2.0 * args.num_layers)
    return args.init_method_std


def from_scratch(key: str, like: torch.Tensor, args: Namespace, seed: int) -> torch.Tensor:
    """Tensor ``key``, of the shape and dtype of ``like``, as Megatron starts a model."""
    std = megatron_std(key, args)
    if isinstance(std, int):
        return torch.full_like(like, std)
    made = torch.empty(like.shape)
    rows, columns = like.shape[-2:]
    step = max(1, MOST_ELEMENTS // columns)
    for matrix in np.ndindex(*like.shape[:-2]):
        for first in range(0, rows, step):
            run = made[matrix][first : first + step]
            run.copy_(normal(tuple(run.shape), generator(seed, key, *matrix, first, 0), std))
    return made.to(like.dtype)
