"""A model from scratch drawn again: what ``weights: random`` must have given, tensor by tensor.

Shares nothing with ``random_weights`` but the rule, which is: a tensor's matrices (its last two axes) are cut
in runs of rows of at most 2^22 elements; each run is drawn in float32 by PyTorch's normal generator on the
CPU, whose seed is the first eight bytes, little-endian, of SHA-256 of "seed:key:offset:offset:...".
"""

import hashlib
import math

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.verify.sources import Place, as_words, inside

MOST_ELEMENTS = 4194304


def seed_of(seed: int, *parts: object) -> int:
    digest = hashlib.sha256()
    digest.update(str(seed).encode())
    for part in parts:
        digest.update(b":" + str(part).encode())
    return int.from_bytes(digest.digest()[:8], "little")


def megatron_std(key: str, model: DenseModel) -> float | int:
    """The standard deviation of a weight; the int 0 or 1 for a parameter that is constant."""
    module, parameter = key.rsplit(".", 1)
    if parameter == "bias" or parameter == "layer_norm_bias":
        return 0
    if parameter == "layer_norm_weight" or module.endswith("layernorm"):
        return 0 if model.flags.get("apply_layernorm_1p") else 1
    if module.endswith(("linear_proj", "linear_fc2")):
        return model.init_method_std / math.sqrt(2.0 * model.num_layers)
    return model.init_method_std


class DrawnTensor:
    """A tensor whose boxes are drawn when they are asked for; the run drawn last is kept."""

    def __init__(self, key: str, shape: Shape, dtype: torch.dtype, std: float | int, seed: int) -> None:
        self.key, self.shape, self.dtype, self.std, self.seed = key, shape, dtype, std, seed
        self._run: tuple[Shape, np.ndarray] | None = None

    def place(self, box: Box) -> Place | None:
        return None

    def read(self, box: Box) -> np.ndarray:
        if isinstance(self.std, int):
            return as_words(torch.full(box.sizes, float(self.std), dtype=self.dtype))
        *front, rows, columns = self.shape
        step = max(1, MOST_ELEMENTS // columns)
        made = None
        for matrix in np.ndindex(*box.sizes[:-2]):
            place = tuple(a + b for a, b in zip(box.offsets, matrix, strict=False))
            for first in range(box.offsets[-2] // step * step, box.ends[-2], step):
                run = Box((*place, first, 0), (*(1 for _ in front), min(step, rows - first), columns))
                common = run.overlap(box)
                assert common is not None
                part = self._drawn(run)[inside(common, run.offsets)]
                if made is None:
                    made = np.empty(box.sizes, part.dtype)
                made[inside(common, box.offsets)] = part
        assert made is not None
        return made

    def _drawn(self, run: Box) -> np.ndarray:
        if self._run is None or self._run[0] != run.offsets:
            generator = torch.Generator()
            generator.manual_seed(seed_of(self.seed, self.key, *run.offsets))
            values = torch.empty(run.sizes).normal_(0.0, float(self.std), generator=generator)
            self._run = run.offsets, as_words(values.to(self.dtype))
        return self._run[1]
