"""What is drawn at random. The rule: PyTorch's normal generator on the CPU, in float32; its seed is the first
eight bytes, little-endian, of SHA-256 of "seed:what:what:..."."""

import hashlib

import torch


def generator(seed: int, *what: object) -> torch.Generator:
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    made = torch.Generator()
    made.manual_seed(int.from_bytes(digest[:8], "little"))
    return made


def normal(shape: tuple[int, ...], random: torch.Generator, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=random)
