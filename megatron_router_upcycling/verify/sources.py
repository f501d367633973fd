"""Where expected values come from: boxes of a stored tensor, or of one that is computed.

Values are read as unsigned integers of the dtype's size: equal means bitwise equal.
"""

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.expected import Computed

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by a dtype's size
Place = tuple[int, int, int, int]  # device, inode, offset and length of a chunk's bytes


class Sources:
    """The values that ``Origin`` names: those of a key of ``checkpoint``, or computed ones."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._computed: dict[Computed, tuple[Box, np.ndarray]] = {}  # the box computed last

    def place(self, source: str | Computed, box: Box) -> Place | None:
        """Where a box of a stored tensor lies, if it is a chunk."""
        if isinstance(source, str):
            for chunk, _ in self.checkpoint.tensors[source].overlapping(box):
                if chunk.box == box:
                    return place_of(self.checkpoint, chunk.blob)
        return None

    def read(self, source: str | Computed, box: Box) -> np.ndarray:
        """Raises: UserError, where the dense checkpoint is damaged."""
        if isinstance(source, str):
            return as_words(self.checkpoint.read_box(source, box))
        joined: np.ndarray | None = None
        for whole in source.boxes(box):
            values, part = self._compute(source, whole), whole.overlap(box)
            assert part is not None
            if joined is None:
                joined = np.empty(box.sizes, values.dtype)
            joined[part.within(box.offsets)] = values[part.within(whole.offsets)]
        assert joined is not None
        return joined

    def _compute(self, source: Computed, box: Box) -> np.ndarray:
        last = self._computed.get(source)
        if last is None or last[0] != box:
            last = self._computed[source] = box, as_words(source.values(box)).reshape(box.sizes)
        return last[1]


def place_of(checkpoint: Checkpoint, blob: Blob) -> Place:
    """Raises: OSError, where the file is missing."""
    status = (checkpoint.iteration_dir / blob.file).stat()
    return status.st_dev, status.st_ino, blob.offset, blob.length


def as_words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, as unsigned integers of its dtype's size."""
    tensor = tensor.contiguous()
    return tensor.flatten().view(torch.uint8).numpy().view(WORDS[tensor.itemsize]).reshape(tensor.shape)
