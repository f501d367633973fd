"""What an upcycled checkpoint must hold, said from the dense checkpoint and the manifest alone.

Nothing here asks the converter what it did. Every tensor has a shape, a dtype, and for every box of it the
places in the dense checkpoint (or in something computed again) that hold the same values.

Symbols: L layers, n experts, m routers, H query heads, G query groups, d head size, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.dense import FC1, FC2, QKV, DenseModel
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.key_stats import KeyStats
from megatron_router_upcycling.router_config import RouterConfig
from megatron_router_upcycling.upcycle import (
    EXPERTS,
    FUSED_NORM,
    LAYERS,
    ROUTER,
    SEPARATE_NORM,
    TRAINING_STATE,
)
from megatron_router_upcycling.verify import routers
from megatron_router_upcycling.verify.sources import ComputedLayers, DataFiles, Source, StoredTensor


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that must equal a box of ``source`` which begins at ``start``.

    ``axes`` gives, for each axis of the source, the tensor's axis that runs along it; None stays at
    ``start``. Axes that none runs along have size 1 in ``box``.
    """

    box: Box
    source: Source
    name: str  # of the source, the same for the same source
    start: Shape
    axes: tuple[int | None, ...]

    def source_box(self, part: Box) -> Box:
        """The source's box for a part of ``box``."""
        offsets, sizes = [], []
        for start, axis in zip(self.start, self.axes, strict=True):
            offsets.append(start if axis is None else start + part.offsets[axis] - self.box.offsets[axis])
            sizes.append(1 if axis is None else part.sizes[axis])
        return Box(tuple(offsets), tuple(sizes))


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor's shape, dtype and values; ``check`` is the finding that a difference counts as."""

    check: str
    shape: Shape
    dtype: torch.dtype
    pieces: Callable[[Box], Iterator[Piece]]  # those that make up a box

    @property
    def expert_axis(self) -> int | None:
        return 1 if self.check == "experts" else None


def expected_tensors(
    dense: Checkpoint,
    files: DataFiles,
    model: DenseModel,
    router: RouterConfig,
    stats: KeyStats | None,
    seed: int,
) -> dict[str, ExpectedTensor]:
    """Every tensor of the Mixture-of-Experts by its key."""
    expected: dict[str, ExpectedTensor] = {}
    for key in dense.tensors:
        if TRAINING_STATE.match(key):
            continue
        source = StoredTensor(dense, files, key)
        if key.startswith((f"{FC1}.", f"{FC2}.")) and FUSED_NORM not in key:
            target = EXPERTS + key.removeprefix(f"{LAYERS}.mlp")
            expected[target] = _experts(source, router.num_experts)
            continue
        expected[key] = _same(source, "untouched")
        for here, there in ((FUSED_NORM, SEPARATE_NORM), (SEPARATE_NORM, FUSED_NORM)):
            other = there + key.removeprefix(here)
            if key.startswith(here) and other not in dense.tensors:
                expected[other] = _same(source, "norms")
    query = StoredTensor(dense, files, QKV)
    if router.router == "linear":
        expected[f"{ROUTER}.weight"] = _linear(model, router.num_experts, seed)
    else:
        expected |= _mixture(query, model, router, stats)
    if not model.flags["disable_bias_linear"]:
        zero = torch.zeros(router.num_experts, dtype=model.dtype)
        expected[f"{ROUTER}.bias"] = _computed(model, (router.num_experts,), lambda layer: zero)
    return expected


def _same(source: StoredTensor, check: str) -> ExpectedTensor:
    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, source, source.key, box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor(check, source.shape, source.dtype, pieces)


def _experts(source: StoredTensor, num_experts: int) -> ExpectedTensor:
    """[L, n, ...] of n copies of [L, ...] (eq. 3)."""

    def pieces(box: Box) -> Iterator[Piece]:
        layer, first, *rest = box.offsets
        for expert in range(first, box.ends[1]):
            one = Box((layer, expert, *rest), (box.sizes[0], 1, *box.sizes[2:]))
            axes = (0, *range(2, len(box.offsets)))
            yield Piece(one, source, source.key, (layer, *rest), axes)

    shape = (source.shape[0], num_experts, *source.shape[1:])
    return ExpectedTensor("experts", shape, source.dtype, pieces)


def _computed(model: DenseModel, shape: Shape, compute: Callable[[int], torch.Tensor]) -> ExpectedTensor:
    source = ComputedLayers(compute)

    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, source, "computed", box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor("routers", (model.num_layers, *shape), model.dtype, pieces)


def _linear(model: DenseModel, num_experts: int, seed: int) -> ExpectedTensor:
    """[L, n, D], drawn from ``seed`` layer after layer."""
    drawn: tuple[int, torch.Generator] | None = None

    def compute(layer: int) -> torch.Tensor:
        nonlocal drawn
        if drawn is None or drawn[0] > layer:
            drawn = 0, torch.Generator().manual_seed(seed)
        upcoming, generator = drawn
        for _ in range(upcoming, layer + 1):
            weight = torch.empty(num_experts, model.hidden_size)
            weight.normal_(std=model.init_method_std, generator=generator)
        drawn = layer + 1, generator
        return weight.to(model.dtype)

    return _computed(model, (num_experts, model.hidden_size), compute)


def _mixture(
    query: StoredTensor, model: DenseModel, router: RouterConfig, stats: KeyStats | None
) -> dict[str, ExpectedTensor]:
    """query_weight [L, m, d', D], rows of the query projection; expert_key [L, n*c, d'], average keys."""
    assert router.num_routers is not None
    H, G, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    m, n = router.num_routers, router.num_experts
    width = H * d // m
    # Without statistics there are shapes and no values: those of a checkpoint that has trained.
    means = np.empty((0, G, d), np.float32) if stats is None else stats.mean.numpy()
    known: tuple[int, routers.LayerSources] | None = None

    def sources(layer: int) -> routers.LayerSources:
        nonlocal known
        if known is None or known[0] != layer:
            known = layer, routers.layer_sources(means[layer], H, m, n, router.grouping)
        return known[1]

    def query_pieces(box: Box) -> Iterator[Piece]:
        for layer in range(box.offsets[0], box.ends[0]):
            for j in range(box.offsets[1], box.ends[1]):
                row = 0
                for rows in sources(layer).queries[j]:
                    fused = routers.fused_row(rows, H, G, d)
                    one = Box((layer, j, row, 0), (1, 1, rows.count, model.hidden_size)).overlap(box)
                    if one is not None:
                        start = (layer, fused + one.offsets[2] - row, one.offsets[3])
                        yield Piece(one, query, query.key, start, (0, 2, 3))
                    row += rows.count

    def keys(layer: int) -> torch.Tensor:
        made = [
            np.concatenate([routers.key_values(rows, means[layer], H) for rows in key])
            for key in sources(layer).keys
        ]
        return torch.from_numpy(np.stack(made)).to(model.dtype)

    shape = (model.num_layers, m, width, model.hidden_size)
    keys_shape = (max(m, n), width)
    return {
        f"{ROUTER}.query_weight": ExpectedTensor("routers", shape, model.dtype, query_pieces),
        f"{ROUTER}.expert_key": _computed(model, keys_shape, keys),
    }
