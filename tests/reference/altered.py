"""The ablations of the start computed again, in NumPy: routers and experts that are not the paper's.

Shares nothing with ``altered_start`` but the rules: what is drawn comes from PyTorch's generator on the CPU
seeded as in ``scratch.seed_of``; statistics are float64 rounded to float32; what is changed is rounded to the
checkpoint's dtype after every change.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.verify.sources import Place, as_words, inside
from tests.reference.scratch import seed_of

Array = np.ndarray
Values = dict[str, torch.Tensor]


def _generator(seed: int, *what: object) -> torch.Generator:
    made = torch.Generator()
    made.manual_seed(seed_of(seed, *what))
    return made


def _rounded(values: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def _numbers(values: torch.Tensor) -> Array:
    return values.double().numpy()


def altered_router(
    values: Values,
    router: RouterConfig,
    init: InitConfig,
    seed: int,
    layer: int,
    gains: tuple[Array, Array] | None,
    inputs: Callable[[], Array],
) -> Values:
    """One layer's parameters, from those that the paper's way or chance gives."""
    dtype = next(iter(values.values())).dtype
    values = dict(values)
    if gains is not None:
        attention, ffn = gains
        ratio = np.array([a / f if f else 0.0 for a, f in zip(attention, ffn, strict=True)])
        values["query_weight"] = _rounded(_numbers(values["query_weight"]) * ratio, dtype)
    for wanted, name in ((init.queries, "query_weight"), (init.keys, "expert_key")):
        if wanted == "random":
            old = _numbers(values[name])
            new = torch.empty(values[name].shape).normal_(generator=_generator(seed, name, layer)).numpy()
            for i in range(len(old)):
                length = math.sqrt((new[i].astype(np.float64) ** 2).sum())
                new[i] *= np.float32(math.sqrt((old[i] ** 2).sum()) / length)
            values[name] = _rounded(new, dtype)
    if init.gate == "centroid":
        copies, shards = router.num_copies, router.granularity
        centres = _k_means(inputs(), copies, _generator(seed, "centroid", layer))
        lengths = np.sqrt((_numbers(values["weight"])[::shards] ** 2).sum(axis=1)).astype(np.float32)
        gate = centres * lengths[:, None].astype(np.float64)
        values["weight"] = _rounded(gate.repeat(shards, axis=0), dtype)
    scale = init.logit_scale
    if init.target_entropy is not None:
        scale = _scale(_logits(values, router, inputs()), init.target_entropy)
    if scale != 1.0:
        name = {"mixture": "expert_key", "mlp": "fc2.weight"}.get(router.router, "weight")
        values[name] = _rounded(_numbers(values[name]) * scale, dtype)
    return values


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1e-12)


def _k_means(inputs: Array, count: int, generator: torch.Generator) -> Array:
    points = _unit(inputs)
    centres = points[torch.randperm(len(points), generator=generator).numpy()[:count]]
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


def _logits(values: Values, router: RouterConfig, inputs: Array) -> Array:
    if router.router == "mixture":  # eq. 6-8 as written
        queries, keys = _numbers(values["query_weight"]), _numbers(values["expert_key"])
        scores = np.stack([(inputs @ query.T) @ keys.T for query in queries]) / math.sqrt(keys.shape[1])
        pooled = scores.max(axis=0) if router.pooling == "max" else scores.sum(axis=0)
        return pooled.reshape(len(inputs), router.num_experts, -1).max(axis=2)
    if router.router == "mlp":
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
    while high - low > 1e-15 * max(abs(low), abs(high)):
        middle = low + (high - low) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if entropy(middle) > target else (low, middle)
    return float(np.float32(math.exp(low)))


def gains_of(dense: Checkpoint, layer: int, centered: bool) -> tuple[Array, Array]:
    """Gains of the norms before attention and before the FFN; ``centered``: stored less the 1."""

    def gain(fused: str, apart: str) -> Array:
        name = f"decoder.layers.{fused}.layer_norm_weight"  # as Transformer Engine keeps it
        if name not in dense.tensors:
            name = f"decoder.layers.{apart}.weight"
        return _numbers(dense.read_layer(name, layer, bytearray())) + centered

    attention = gain("self_attention.linear_qkv", "input_layernorm")
    return attention, gain("mlp.linear_fc1", "pre_mlp_layernorm")


def router_inputs(path: Path, layer: int) -> Array:
    """A layer's sample of router inputs [S, D].

    Raises:
        UserError: the file, which has been found to be one of key statistics, holds none.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        if "router_input" not in set(file.keys()):
            raise UserError(
                f"--key-stats {path}: holds no hidden states (router_input); name the file that had"
            )
        return _numbers(file.get_slice("router_input")[layer])


class AlteredExperts:
    """Experts [L, n, ...] with noise or channels drawn anew; one expert at a time is in memory."""

    def __init__(self, dense: Checkpoint, key: str, model: DenseModel, init: InitConfig, seed: int) -> None:
        self.dense, self.key, self.model, self.init, self.seed = dense, key, model, init, seed
        self.linear = key.split(".")[-2]
        self._made: tuple[tuple[int, int], Array] | None = None

    def place(self, box: Box) -> Place | None:
        return None

    def read(self, box: Box) -> Array:
        parts = []
        for layer in range(box.offsets[0], box.ends[0]):
            for expert in range(box.offsets[1], box.ends[1]):
                inner = Box(box.offsets[2:], box.sizes[2:])
                parts.append(self._expert(layer, expert)[inside(inner, (0, 0))])
        return np.stack(parts).reshape(box.sizes)

    def _expert(self, layer: int, expert: int) -> Array:
        if self._made is None or self._made[0] != (layer, expert):
            self._made = (layer, expert), as_words(self._compute(layer, expert))
        return self._made[1]

    def _compute(self, layer: int, expert: int) -> torch.Tensor:
        stored = self.dense.read_layer(self.key, layer, bytearray())
        weight = stored.float().numpy().copy()
        made, init = weight.copy(), self.init

        def normal(shape: tuple[int, ...], generator: torch.Generator) -> Array:
            return torch.empty(shape).normal_(generator=generator).numpy()

        if init.expert_noise:
            deviation = np.float32(init.expert_noise * weight.astype(np.float64).std())
            noise = normal(weight.shape, _generator(self.seed, "noise", self.linear, layer, expert))
            made = made + deviation * noise
        if init.drop_upcycling:
            rows = self.linear == "linear_fc1"
            channels = np.arange(self.model.ffn_hidden_size)
            shuffled = torch.randperm(
                len(channels), generator=_generator(self.seed, "channels", layer, expert)
            )
            chosen = np.sort(shuffled.numpy()[: round(init.drop_upcycling * len(channels))])
            generator = _generator(self.seed, "drop", self.linear, layer, expert)
            starts = (0, len(channels)) if rows and self.model.gated else (0,)
            for start in starts:
                matrix = weight[start : start + len(channels)] if rows else weight
                mean, deviation = (
                    np.float32(statistic) for statistic in (_mean(matrix), matrix.astype(np.float64).std())
                )
                if rows:
                    drawn = normal((len(chosen), weight.shape[1]), generator)
                    made[start + chosen] = mean + deviation * drawn
                else:
                    made[:, chosen] = mean + deviation * normal((len(weight), len(chosen)), generator)
        return torch.from_numpy(made).to(stored.dtype)


def _mean(matrix: Array) -> float:
    return float(matrix.astype(np.float64).mean())
