"""What an upcycled checkpoint must hold, said from the dense checkpoint and the manifest alone.

Nothing here asks the converter what it did. Every tensor has a shape, a dtype, and for every box of it the
places in the dense checkpoint (or in something computed again) that hold the same values.

Symbols: L layers, n experts, m routers, H query heads, G query groups, d head size, D hidden size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.finite import WORDS
from megatron_router_upcycling.checkpoint.names import (
    EXPERTS,
    FC1,
    FC2,
    FUSED_NORM,
    LAYERS,
    QKV,
    ROUTER,
    SEPARATE_NORM,
    SHARED_EXPERT,
    TRAINING_STATE,
    at_layer,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.verify import altered, routers, scratch
from megatron_router_upcycling.verify.layout import Layout
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

    def values(self, layer: int) -> torch.Tensor:
        """``tensor[layer]`` of one stacked over layers, whole."""
        made: np.ndarray = np.empty(self.shape[1:], WORDS[self.dtype.itemsize])
        for piece in self.pieces(Box((layer, *(0 for _ in self.shape[1:])), (1, *self.shape[1:]))):
            place = tuple(map(slice, piece.box.offsets[1:], piece.box.ends[1:]))
            made[place] = piece.source.read(piece.source_box(piece.box)).reshape(piece.box.sizes[1:])
        return torch.from_numpy(made).view(self.dtype)

    def of_layer(self, layer: int) -> "ExpectedTensor":
        """``tensor[layer]`` of one stacked over layers."""

        def pieces(box: Box) -> Iterator[Piece]:
            for piece in self.pieces(Box((layer, *box.offsets), (1, *box.sizes))):
                inner = Box(piece.box.offsets[1:], piece.box.sizes[1:])
                axes = tuple(axis - 1 if axis else None for axis in piece.axes)
                yield replace(piece, box=inner, axes=axes)

        return ExpectedTensor(self.check, self.shape[1:], self.dtype, pieces)


def expected_tensors(
    dense: Checkpoint,
    files: DataFiles,
    model: DenseModel,
    router: RouterConfig,
    stats: KeyStats | None,
    init: InitConfig,
    key_stats_file: Path | None,
    seed: int,
    layout: Layout,
) -> dict[str, ExpectedTensor]:
    """Every tensor of the Mixture-of-Experts by its key."""
    everywhere = _stacked(dense, files, model, router, stats, seed, layout)
    if init.weights == "random":
        everywhere = _all_drawn(everywhere, model, seed)
    if init.alters_router:
        everywhere |= _altered_routers(everywhere, dense, model, router, init, seed, key_stats_file)
    if init.alters_experts:
        everywhere |= _altered_experts(everywhere, dense, model, init, seed)
    if layout.layers is None:
        return everywhere
    nowhere = {
        key: _same(StoredTensor(dense, files, key), "untouched")
        for key in dense.tensors
        if not TRAINING_STATE.match(key)
    }
    if init.weights == "random":
        nowhere = _all_drawn(nowhere, model, seed)
    expected = {key: tensor for key, tensor in nowhere.items() if not key.startswith(LAYERS)}
    for layer in range(model.num_layers):
        tensors = everywhere if layout.has_experts(layer) else nowhere
        for key, tensor in tensors.items():
            if key.startswith(LAYERS):
                expected[at_layer(key, layer)] = tensor.of_layer(layer)
    return expected


def _stacked(
    dense: Checkpoint,
    files: DataFiles,
    model: DenseModel,
    router: RouterConfig,
    stats: KeyStats | None,
    seed: int,
    layout: Layout,
) -> dict[str, ExpectedTensor]:
    """What there is where every layer has experts."""
    expected: dict[str, ExpectedTensor] = {}
    for key in dense.tensors:
        if TRAINING_STATE.match(key):
            continue
        source = StoredTensor(dense, files, key)
        if key.startswith((f"{FC1}.", f"{FC2}.")) and FUSED_NORM not in key:
            parameter = key.removeprefix(f"{LAYERS}.mlp")
            expected[EXPERTS + parameter] = _experts(source, router.num_experts, router.granularity, model)
            if layout.shared_expert:
                expected[SHARED_EXPERT + parameter] = _shared(source, dense)
            continue
        expected[key] = _same(source, "untouched")
        for here, there in ((FUSED_NORM, SEPARATE_NORM), (SEPARATE_NORM, FUSED_NORM)):
            other = there + key.removeprefix(here)
            if key.startswith(here) and other not in dense.tensors:
                expected[other] = _same(source, "norms")
    query = StoredTensor(dense, files, QKV)
    if router.router == "mixture":
        expected |= _mixture(query, model, router, stats)
    elif router.router != "locmoe":
        expected |= _drawn(model, router, seed, layout.layers or range(model.num_layers))
    if not model.flags["disable_bias_linear"] and router.router != "locmoe":
        zero = torch.zeros(router.num_experts, dtype=model.dtype)
        expected[f"{ROUTER}.bias"] = _computed(model, (router.num_experts,), lambda layer: zero)
    return expected


def _same(source: StoredTensor, check: str) -> ExpectedTensor:
    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, source, source.key, box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor(check, source.shape, source.dtype, pieces)


def _experts(source: StoredTensor, num_experts: int, granularity: int, model: DenseModel) -> ExpectedTensor:
    """[L, n, ...] of n copies of [L, ...] (eq. 3), each cut ``granularity`` ways along F.

    A gated FC1 is cut in its gate and in its up projection alike.
    """
    cut = 1 if source.key.startswith(f"{FC1}.") or granularity == 1 else 2  # the axis of F in the source
    parts = 1 + (model.gated and cut == 1 and granularity > 1)
    block = source.shape[cut] // parts
    width = block // granularity

    def pieces(box: Box) -> Iterator[Piece]:
        for expert, part in itertools.product(range(box.offsets[1], box.ends[1]), range(parts)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[1], sizes[1] = expert, 1
            low = max(offsets[cut + 1], part * width)
            sizes[cut + 1] = min(box.ends[cut + 1], (part + 1) * width) - low
            if sizes[cut + 1] <= 0:
                continue
            offsets[cut + 1] = low
            start = [offsets[0], *offsets[2:]]
            start[cut] += part * (block - width) + expert % granularity * width
            axes = (0, *range(2, len(offsets)))
            yield Piece(Box(tuple(offsets), tuple(sizes)), source, source.key, tuple(start), axes)

    sizes = list(source.shape)
    sizes[cut] //= granularity
    shape = (sizes[0], num_experts, *sizes[1:])
    return ExpectedTensor("experts", shape, source.dtype, pieces)


def _shared(source: StoredTensor, dense: Checkpoint) -> ExpectedTensor:
    """The shared expert's: FC1 as it is, FC2 halved."""
    if source.key.startswith(f"{FC1}."):
        return _same(source, "experts")

    def half(layer: int) -> torch.Tensor:
        return dense.read_layer(source.key, layer, bytearray()) / 2

    halves = ComputedLayers(half)

    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, halves, "halves", box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor("experts", source.shape, source.dtype, pieces)


def _computed(model: DenseModel, shape: Shape, compute: Callable[[int], torch.Tensor]) -> ExpectedTensor:
    source = ComputedLayers(compute)

    def pieces(box: Box) -> Iterator[Piece]:
        yield Piece(box, source, "computed", box.offsets, tuple(range(len(box.offsets))))

    return ExpectedTensor("routers", (model.num_layers, *shape), model.dtype, pieces)


def _all_drawn(tensors: dict[str, ExpectedTensor], model: DenseModel, seed: int) -> dict[str, ExpectedTensor]:
    """All but the routers drawn anew, as Megatron draws a model from scratch."""

    def drawn(key: str, tensor: ExpectedTensor) -> ExpectedTensor:
        source = scratch.DrawnTensor(key, tensor.shape, tensor.dtype, scratch.megatron_std(key, model), seed)

        def pieces(box: Box) -> Iterator[Piece]:
            yield Piece(box, source, "drawn", box.offsets, tuple(range(len(box.offsets))))

        return replace(tensor, pieces=pieces)

    return {key: tensor if ROUTER in key else drawn(key, tensor) for key, tensor in tensors.items()}


def _altered_routers(
    tensors: dict[str, ExpectedTensor],
    dense: Checkpoint,
    model: DenseModel,
    router: RouterConfig,
    init: InitConfig,
    seed: int,
    key_stats_file: Path | None,
) -> dict[str, ExpectedTensor]:
    """The routers' parameters as ``init`` changes them, a layer at a time."""
    prefix = f"{ROUTER}."
    plain = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key != f"{ROUTER}.bias"
    }
    known: tuple[int, altered.Values] | None = None

    def inputs(layer: int) -> np.ndarray:
        assert key_stats_file is not None
        return altered.router_inputs(key_stats_file, layer)

    def values(layer: int) -> altered.Values:
        nonlocal known
        if known is None or known[0] != layer:
            centered = bool(model.flags.get("apply_layernorm_1p"))
            gains = altered.gains_of(dense, layer, centered) if init.norm_gain else None
            paper = {name: tensor.values(layer) for name, tensor in plain.items()}
            known = (
                layer,
                altered.altered_router(paper, router, init, seed, layer, gains, lambda: inputs(layer)),
            )
        return known[1]

    def parameter(name: str, tensor: ExpectedTensor) -> ExpectedTensor:
        return _computed(model, tensor.shape[1:], lambda layer: values(layer)[name])

    return {prefix + name: parameter(name, tensor) for name, tensor in plain.items()}


def _altered_experts(
    tensors: dict[str, ExpectedTensor], dense: Checkpoint, model: DenseModel, init: InitConfig, seed: int
) -> dict[str, ExpectedTensor]:
    """FC1 and FC2 of experts that differ; biases stay as they are."""
    changed = {}
    for linear in (FC1, FC2):
        key = f"{EXPERTS}{linear.removeprefix(f'{LAYERS}.mlp')}.weight"
        source = altered.AlteredExperts(dense, f"{linear}.weight", model, init, seed)

        def pieces(box: Box, source: altered.AlteredExperts = source) -> Iterator[Piece]:
            yield Piece(box, source, "altered", box.offsets, tuple(range(len(box.offsets))))

        changed[key] = replace(tensors[key], pieces=pieces)
    return changed


def _drawn(
    model: DenseModel, router: RouterConfig, seed: int, layers: Sequence[int]
) -> dict[str, ExpectedTensor]:
    """Random routers, drawn from ``seed`` for one of ``layers`` after the other; shards have their copy's."""
    D, n, G = model.hidden_size, router.num_copies, router.granularity
    rows = {"fc1.weight": D, "fc2.weight": n} if router.router == "mlp" else {"weight": n}
    drawn: tuple[int, torch.Generator, list[torch.Tensor]] | None = None

    def values(layer: int) -> list[torch.Tensor]:
        nonlocal drawn
        turn = layers.index(layer)
        if drawn is None or drawn[0] > turn + 1:
            drawn = 0, torch.Generator().manual_seed(seed), []
        upcoming, generator, last = drawn
        for _ in range(upcoming, turn + 1):
            last = [torch.empty(count, D) for count in rows.values()]
            for weight in last:
                weight.normal_(std=model.init_method_std, generator=generator)
        drawn = turn + 1, generator, last
        return last

    def parameter(place: int, count: int) -> ExpectedTensor:
        shards = G if place == len(rows) - 1 else 1  # the last has a row for each expert

        def compute(layer: int) -> torch.Tensor:
            return values(layer)[place].repeat_interleave(shards, dim=0).to(model.dtype)

        return _computed(model, (count * shards, D), compute)

    return {f"{ROUTER}.{name}": parameter(place, count) for place, (name, count) in enumerate(rows.items())}


def _mixture(
    query: StoredTensor, model: DenseModel, router: RouterConfig, stats: KeyStats | None
) -> dict[str, ExpectedTensor]:
    """query_weight [L, m, d', D], rows of the query projection; expert_key [L, n*c, d'], average keys."""
    assert router.num_routers is not None
    H, G, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    m, n, shards = router.num_routers, router.num_copies, router.granularity
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
        per_copy = np.stack(made).reshape(n, -1, width)
        return torch.from_numpy(per_copy.repeat(shards, axis=0).reshape(-1, width)).to(model.dtype)

    shape = (model.num_layers, m, width, model.hidden_size)
    keys_shape = (max(m, n) * shards, width)
    return {
        f"{ROUTER}.query_weight": ExpectedTensor("routers", shape, model.dtype, query_pieces),
        f"{ROUTER}.expert_key": _computed(model, keys_shape, keys),
    }
