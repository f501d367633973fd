"""Read every chunk of a checkpoint in blocks and compare it with what it must be.

A chunk that is a hard link to the dense checkpoint's bytes is equal without a comparison; its bytes are still
read, to verify their checksum.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Box, blocks
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk
from megatron_router_upcycling.checkpoint.format.torch_save_file import BLOCK_BYTES, Damaged
from megatron_router_upcycling.checkpoint.names import EXPERTS, is_of_layers, split_key
from megatron_router_upcycling.checkpoint.publish.checks import all_finite
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.steps import Expected, Values
from megatron_router_upcycling.errors import reason
from megatron_router_upcycling.verify.findings import Findings, span

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by a dtype's size

Progress = Callable[[int], None]


class Sources:
    """The values that an ``Origin`` refers to: those of a key of ``checkpoint``, or others."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._computed: dict[Values, tuple[Box, np.ndarray]] = {}  # the box computed last

    def read(self, source: str | Values, box: Box) -> np.ndarray:
        if isinstance(source, str):
            return as_words(self.checkpoint.read_box(source, box))
        joined: np.ndarray | None = None
        for whole in source.boxes(box):
            last = self._computed.get(source)
            if last is None or last[0] != whole:
                last = self._computed[source] = whole, as_words(source.values(whole)).reshape(whole.sizes)
            values, part = last[1], whole.overlap(box)
            assert part is not None
            if joined is None:
                joined = np.empty(box.sizes, values.dtype)
            joined[part.within(box.offsets)] = values[part.within(whole.offsets)]
        assert joined is not None
        return joined


class Comparison:
    """Compares the tensors of ``moe`` with ``sources``, one by one; differences go to ``findings``."""

    def __init__(self, moe: Checkpoint, sources: Sources, findings: Findings, progress: Progress) -> None:
        self.moe, self.sources, self.findings, self.progress = moe, sources, findings, progress
        self.identities: dict[Blob, bytes] = {}  # of every chunk's bytes
        self.compared: dict[str, int] = {}  # check -> bytes that were compared
        self.read = 0  # bytes, of all

    def compare(self, key: str, expected: Expected | None) -> None:
        """Read tensor ``key`` and compare it; without ``expected``, check it only for damage and NaN."""
        # Chunks that share bytes and must hold the same values, such as the experts', are read once.
        alike: dict[object, list[Chunk]] = {}
        for chunk in self.moe.tensors[key].chunks:
            origins = tuple(
                (tuple(map(int.__sub__, box.offsets, chunk.offsets)), box.sizes, source, place)
                for box, source, place in (expected.origins(chunk.box) if expected else ())
            )
            alike.setdefault((chunk.blob, chunk.sizes, origins), []).append(chunk)
        for chunks in alike.values():
            self._compare(key, expected, chunks)

    def _compare(self, key: str, expected: Expected | None, chunks: list[Chunk]) -> None:
        chunk, dtype, place = chunks[0], self.moe.tensors[key].dtype, where(key, chunks)
        blob, nbytes = chunk.blob, math.prod(chunk.sizes) * dtype.itemsize
        finite, different, first = True, 0, [0]
        try:
            contents = torch_save_file.examine(self.moe.iteration_dir, blob, (chunk.sizes, dtype))
            self.identities[blob] = contents.identity
            unproved = expected if expected and not self._is_linked(chunk, expected) else None
            for block, words in self._blocks(chunk, dtype, contents.values):
                finite = finite and all_finite(torch.from_numpy(words).view(dtype))
                for box, source, origin in unproved.origins(block) if unproved else ():
                    wanted = self.sources.read(source, origin).reshape(box.sizes)
                    differs = words[box.within(block.offsets)] != wanted
                    if differs.any() and not different:
                        index = np.unravel_index(int(differs.argmax()), differs.shape)
                        first = [int(i) + offset for i, offset in zip(index, box.offsets, strict=True)]
                    different += int(np.count_nonzero(differs))
                self.progress(words.nbytes)
            self.read += nbytes
        except Damaged as error:
            what = f"{blob.file}, {blob.length} bytes at {blob.offset}: {error}"
            self.findings.add("damage", key, what, *place)
        if not finite:
            self.findings.add("finite", key, "NaN or infinity", *place)
        if expected is not None:
            self.compared[expected.check] = self.compared.get(expected.check, 0) + nbytes
            if different:
                what = f"{different} values differ, the first at {first}"
                self.findings.add(expected.check, key, what, *place)

    def _is_linked(self, chunk: Chunk, expected: Expected) -> bool:
        """Whether the chunk is a hard link to the dense checkpoint's bytes, and so equal to them."""
        origins, dense = list(expected.origins(chunk.box)), self.sources.checkpoint
        if len(origins) != 1 or not isinstance(source := origins[0].source, str):
            return False
        place = origins[0].place
        here = [other.blob for other, _ in dense.tensors[source].overlapping(place) if other.box == place]
        return place_of(self.moe, chunk.blob) in [place_of(dense, blob) for blob in here]

    def _blocks(
        self, chunk: Chunk, dtype: torch.dtype, values: torch_save_file.Values | None
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """A chunk's values, block by block in one buffer, which is overwritten; raises ``Damaged``."""
        if values is None:  # they do not lie row after row, and PyTorch reads them
            try:
                yield chunk.box, as_words(self.moe.read_chunk(chunk, dtype, bytearray()))
            except Exception as error:  # what PyTorch raises on a damaged or hostile file
                raise Damaged(reason(error)) from None
            return
        boxes = list(blocks(chunk.box, BLOCK_BYTES // dtype.itemsize))
        lengths = [math.prod(box.sizes) * dtype.itemsize for box in boxes]
        path = self.moe.iteration_dir / chunk.blob.file
        for box, view in zip(boxes, torch_save_file.read_values(path, values, lengths), strict=True):
            yield box, np.frombuffer(view, WORDS[dtype.itemsize]).reshape(box.sizes)


def where(key: str, chunks: list[Chunk]) -> tuple[str, str]:
    """The layers and the experts of chunks, as words; empty where the tensor has none."""
    if not is_of_layers(key):
        return "", ""

    def along(axis: int) -> str:
        return span(
            index for chunk in chunks for index in range(chunk.box.offsets[axis], chunk.box.ends[axis])
        )

    name, layer = split_key(key)
    layers = along(0) if layer is None else str(layer)
    experts = along(int(layer is None)) if name.startswith(EXPERTS) else ""
    return layers, experts


def place_of(checkpoint: Checkpoint, blob: Blob) -> tuple[int, int, int, int]:
    """Device, inode, offset and length of a chunk's bytes."""
    status = (checkpoint.iteration_dir / blob.file).stat()
    return status.st_dev, status.st_ino, blob.offset, blob.length


def as_words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, as unsigned integers of its dtype's size: equal means bitwise equal."""
    tensor = tensor.contiguous()
    return tensor.flatten().view(torch.uint8).numpy().view(WORDS[tensor.itemsize]).reshape(tensor.shape)
