"""What an upcycled checkpoint must hold, by the dense checkpoint, the key statistics and the manifest.

Every tensor has a shape, a dtype, and for every box of it the place in the dense checkpoint that holds the
same values; or its values are computed, by the functions of ``initialisation`` that the converter uses too.
The tests hold these against slow ones that share no code with them.

Symbols: L layers, n experts, F FFN size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.names import (
    EXPERTS,
    FC1,
    FC2,
    FUSED_NORM,
    LAYERS,
    SHARED_EXPERT,
    TRAINING_STATE,
    at_layer,
    other_norm,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.initialisation import random_weights
from megatron_router_upcycling.initialisation.ablations import alter_expert
from megatron_router_upcycling.initialisation.first_routers import router_parameters, router_values
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.verify.layout import Layout
from megatron_router_upcycling.verify.pieces import ExpectedTensor, Piece, computed, copy_of, equal_to
from megatron_router_upcycling.verify.sources import ComputedTensor, DataFiles, StoredTensor

Tensors = dict[str, ExpectedTensor]
Parameters = tuple[torch.Tensor, ...]  # of one layer's router


@dataclass(frozen=True)
class Start:
    """How the first values come about, as the manifest says.

    ``stats`` are the key statistics and their file; None where none are needed.
    """

    router: RouterConfig
    init: InitConfig
    stats: tuple[KeyStats, Path] | None
    seed: int


def expected_tensors(
    dense: Checkpoint, files: DataFiles, model: DenseModel, start: Start, layout: Layout
) -> Tensors:
    """Every tensor of the Mixture-of-Experts by its key; ``files`` are the dense checkpoint's."""
    stored = {key: StoredTensor(dense, files, key) for key in dense.tensors if not TRAINING_STATE.match(key)}
    without = {key: copy_of(tensor, "untouched") for key, tensor in stored.items()}
    having = _with_experts(dense, stored, model, start, layout)
    if start.init.weights == "random":
        without, having = (_drawn(tensors, model, start.seed) for tensors in (without, having))
    having |= _routers(dense, model, start, layout.layers or range(model.num_layers))
    if layout.layers is None:
        return having
    expected = {key: tensor for key, tensor in without.items() if not key.startswith(LAYERS)}
    for layer in range(model.num_layers):
        for key, tensor in (having if layout.has_experts(layer) else without).items():
            if key.startswith(LAYERS):
                expected[at_layer(key, layer)] = tensor.of_layer(layer)
    return expected


def _with_experts(
    dense: Checkpoint, stored: dict[str, StoredTensor], model: DenseModel, start: Start, layout: Layout
) -> Tensors:
    """What there is where every layer has experts, but for the routers."""
    expected: Tensors = {}
    for key, tensor in stored.items():
        if key.startswith((f"{FC1}.", f"{FC2}.")) and FUSED_NORM not in key:
            parameter = key.removeprefix(f"{LAYERS}.mlp")
            expected[EXPERTS + parameter] = _experts(dense, tensor, model, start)
            if layout.shared_expert:
                expected[SHARED_EXPERT + parameter] = _shared_expert(dense, tensor)
            continue
        expected[key] = copy_of(tensor, "untouched")
        other = other_norm(key)
        if other and other not in stored:
            expected[other] = copy_of(tensor, "norms")
    return expected


def _experts(dense: Checkpoint, source: StoredTensor, model: DenseModel, start: Start) -> ExpectedTensor:
    if start.init.alters_experts and source.key.endswith(".weight"):
        return _altered_experts(dense, source, model, start)
    return _copied_experts(source, model, start.router)


def _copied_experts(source: StoredTensor, model: DenseModel, router: RouterConfig) -> ExpectedTensor:
    """[L, n, ...] of copies of [L, ...] (eq. 3), each cut into ``granularity`` shards along F.

    A gated FC1 is cut in its gate and in its up projection alike.
    """
    granularity = router.granularity
    axis = 1 if source.key.startswith(f"{FC1}.") or granularity == 1 else 2  # of F in the source
    parts = 1 + (model.gated and axis == 1 and granularity > 1)
    block = source.shape[axis] // parts
    width = block // granularity

    def pieces(box: Box) -> Iterator[Piece]:
        for expert, part in itertools.product(range(box.offsets[1], box.ends[1]), range(parts)):
            low = max(box.offsets[axis + 1], part * width)
            high = min(box.ends[axis + 1], (part + 1) * width)
            if low >= high:
                continue
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[1], sizes[1] = expert, 1
            offsets[axis + 1], sizes[axis + 1] = low, high - low
            start = [offsets[0], *offsets[2:]]
            start[axis] += part * (block - width) + expert % granularity * width
            axes = (0, *range(2, len(offsets)))
            yield Piece(Box(tuple(offsets), tuple(sizes)), source, source.key, tuple(start), axes)

    shape = list(source.shape)
    shape[axis] //= granularity
    shape.insert(1, router.num_experts)
    return ExpectedTensor("experts", tuple(shape), source.dtype, pieces)


def _altered_experts(
    dense: Checkpoint, source: StoredTensor, model: DenseModel, start: Start
) -> ExpectedTensor:
    """[L, n, ...] of experts that differ; one at a time is computed."""
    linear = source.key.split(".")[-2]

    def compute(layer: int, expert: int) -> torch.Tensor:
        weight = dense.read_layer(source.key, layer, bytearray())
        return alter_expert(weight, linear, model.gated, start.init, start.seed, layer, expert)

    num_layers, *rest = source.shape
    shape = (num_layers, start.router.num_experts, *rest)
    return computed(compute, "experts", shape, source.dtype, num_axes=2)


def _shared_expert(dense: Checkpoint, source: StoredTensor) -> ExpectedTensor:
    """FC1 as it is, FC2 halved."""
    if source.key.startswith(f"{FC1}."):
        return copy_of(source, "experts")

    def half(layer: int) -> torch.Tensor:
        return dense.read_layer(source.key, layer, bytearray()) / 2

    return computed(half, "experts", source.shape, source.dtype)


def _drawn(tensors: Tensors, model: DenseModel, seed: int) -> Tensors:
    """The same tensors with values drawn as Megatron draws a model from scratch."""
    centered_norms = bool(model.flags.get("apply_layernorm_1p"))

    def drawn(key: str, tensor: ExpectedTensor) -> ExpectedTensor:
        mean, std = random_weights.first_values(key, model.init_method_std, model.num_layers, centered_norms)
        source = ComputedTensor(
            tensor.dtype,
            lambda box: random_weights.blocks(tensor.shape, box),
            lambda block: random_weights.draw(seed, key, block, mean, std),
        )
        return equal_to(source, "drawn", tensor.check, tensor.shape, tensor.dtype)

    return {key: drawn(key, tensor) for key, tensor in tensors.items()}


def _routers(dense: Checkpoint, model: DenseModel, start: Start, layers: Sequence[int]) -> Tensors:
    """The parameters of the routers, which ``layers`` have."""

    def make() -> Iterator[Parameters]:
        return router_values(
            dense, model, start.router, start.init, start.stats, start.seed, bytearray(), layers
        )

    routers = _LayersInTurn(make, layers)

    def parameter(place: int, shape: tuple[int, ...]) -> ExpectedTensor:
        return computed(lambda layer: routers.values(layer)[place], "routers", shape, model.dtype)

    parameters = router_parameters(model, start.router)
    return {key: parameter(place, shape) for place, (key, shape) in enumerate(parameters)}


class _LayersInTurn:
    """Values that ``make`` gives for one of ``layers`` after the other; those of one layer are kept.

    Random routers come from one generator, so that a layer's values need those of the layers before it.
    """

    def __init__(self, make: Callable[[], Iterator[Parameters]], layers: Sequence[int]) -> None:
        self.make, self.layers = make, layers
        self._next, self._made = 0, make()
        self._values: Parameters = ()

    def values(self, layer: int) -> Parameters:
        turn = self.layers.index(layer)
        if turn + 1 < self._next:
            self._next, self._made = 0, self.make()
        while self._next <= turn:
            self._next, self._values = self._next + 1, next(self._made)
        return self._values
