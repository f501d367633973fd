"""The ablations of the start, in NumPy: routers that are not the paper's.

Statistics are float64 rounded to float32; what is changed is rounded to the checkpoint's dtype after every
change. What is drawn at random is of PyTorch's normal generator on the CPU, in float32, whose seed is the
first eight bytes, little-endian, of SHA-256 of "seed:what:what:...".
"""

import hashlib
import math

import numpy as np
import torch

from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.routers.config import RouterConfig

Array = np.ndarray
Values = dict[str, torch.Tensor]


def generator(seed: int, *what: object) -> torch.Generator:
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def normal(shape: tuple[int, ...], random: torch.Generator, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=random)


def _rounded(values: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def _numbers(values: torch.Tensor) -> Array:
    return values.double().numpy()


def router(
    values: Values, config: RouterConfig, init: InitConfig, seed: int, layer: int, router_input: torch.Tensor
) -> Values:
    """One layer's parameters, from those that the paper's way or chance gives; ``router_input`` is [S, D]."""
    dtype, inputs = next(iter(values.values())).dtype, _numbers(router_input)
    values = dict(values)
    for wanted, name in ((init.queries, "query_weight"), (init.keys, "expert_key")):
        if wanted == "random":
            old = _numbers(values[name])
            new = normal(tuple(values[name].shape), generator(seed, name, layer)).numpy()
            for i in range(len(old)):
                length = math.sqrt((new[i].astype(np.float64) ** 2).sum())
                new[i] *= np.float32(math.sqrt((old[i] ** 2).sum()) / length)
            values[name] = _rounded(new, dtype)
    if init.gate == "centroid":
        copies, shards = config.num_experts // config.granularity, config.granularity
        centres = _k_means(inputs, copies, generator(seed, "centroid", layer))
        lengths = np.sqrt((_numbers(values["weight"])[::shards] ** 2).sum(axis=1)).astype(np.float32)
        gate = centres * lengths[:, None].astype(np.float64)
        values["weight"] = _rounded(gate.repeat(shards, axis=0), dtype)
    wide = "query_weight" if config.router == "mixture" else "weight"
    if init.center:
        mean = inputs.mean(axis=0)
        off = np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean)
        values[wide] = _rounded(_numbers(values[wide]) @ off, dtype)
    if init.equalize:
        gate, narrow = _numbers(values[wide]), "expert_key" if config.router == "mixture" else "weight"
        if config.router == "mixture":
            keys = _numbers(values["expert_key"])
            gate = sum(keys @ query for query in gate) / math.sqrt(keys.shape[1])
        first = [i for i in range(len(gate)) if i * config.num_experts // len(gate) % config.granularity == 0]
        square = np.cov(gate[first] @ inputs.T) if init.equalize == "logits" else gate[first] @ gate[first].T
        square = np.diag(np.diag(square)) if init.equalize == "rows" else square
        squares, vectors = np.linalg.eigh(square)  # (A A^T)^(-1/2), and the norm of A
        squares, vectors = squares[squares > 1e-12 * squares[-1]], vectors[:, squares > 1e-12 * squares[-1]]
        root = vectors @ np.diag(squares**-0.5) @ vectors.T * math.sqrt(squares.mean())
        rows = (root @ _numbers(values[narrow])[first]).reshape(config.num_experts // config.granularity, -1)
        made = rows.repeat(config.granularity, axis=0).reshape(len(gate), -1)
        values[narrow] = _rounded(made, dtype)
    if init.target_entropy is not None:
        scale = _scale(_logits(values, config, inputs), init.target_entropy)
        name = {"mixture": "expert_key", "mlp": "fc2.weight"}.get(config.router, "weight")
        values[name] = _rounded(_numbers(values[name]) * scale, dtype)
    return values


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1e-12)


def _k_means(inputs: Array, count: int, random: torch.Generator) -> Array:
    points = _unit(inputs)
    centres = points[torch.randperm(len(points), generator=random).numpy()[:count]]
    for _ in range(50):
        products = points @ centres.T
        nearest, likeness = products.argmax(axis=1), products.max(axis=1)
        moved = np.stack([points[nearest == i].sum(axis=0) for i in range(count)])
        for i in range(count):
            if not (nearest == i).any():
                stray = int(likeness.argmin())
                moved[i], likeness[stray] = points[stray], 2.0
        moved = _unit(moved)
        if np.allclose(moved, centres, rtol=0, atol=1e-14):
            return moved
        centres = moved
    return centres


def _logits(values: Values, config: RouterConfig, inputs: Array) -> Array:
    if config.router == "mixture":  # eq. 6-8 as written
        queries, keys = _numbers(values["query_weight"]), _numbers(values["expert_key"])
        scores = np.stack([(inputs @ query.T) @ keys.T for query in queries]) / math.sqrt(keys.shape[1])
        pooled = scores.max(axis=0) if config.pooling == "max" else scores.sum(axis=0)
        return pooled.reshape(len(inputs), config.num_experts, -1).max(axis=2)
    if config.router == "mlp":
        hidden = inputs @ _numbers(values["fc1.weight"]).T
        hidden = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy()
        return hidden @ _numbers(values["fc2.weight"]).T
    return inputs @ _numbers(values["weight"]).T


def _scale(logits: Array, target: float) -> float:
    """Where the mean entropy, which falls with the scale, passes ``target``; halving in the logarithm."""

    def entropy(power: float) -> float:
        scaled = logits * math.exp(power)
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        p = np.exp(scaled)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        return float(-(p * (scaled - np.log(total))).sum(axis=1).mean())

    low, high = math.log(1e-8), math.log(1e8)
    for _ in range(100):
        middle = low + (high - low) / 2
        low, high = (middle, high) if entropy(middle) > target else (low, middle)
    return float(np.float32(math.exp(low)))
