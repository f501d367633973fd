"""Where expected values come from: boxes of a stored tensor, or of one that is computed.

Values are read as unsigned integers of the dtype's size: equal means bitwise equal.
"""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.format.files import FileRange, read_exactly
from megatron_router_upcycling.checkpoint.format.finite import WORDS
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.format.torch_save_file import Contents, Damaged, examine
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.expected import Computed

Place = tuple[int, int, int, int]  # device, inode, offset and length of a chunk's bytes


class DataFiles:
    """The data files of an iteration's folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}
        self._inodes: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def file(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = open(self.folder / name, "rb", buffering=0)  # noqa: SIM115
        return self._open[name]

    def place(self, blob: Blob) -> Place:
        if blob.file not in self._inodes:
            status = (self.folder / blob.file).stat()
            self._inodes[blob.file] = status.st_dev, status.st_ino
        return (*self._inodes[blob.file], blob.offset, blob.length)

    def examine(self, blob: Blob) -> Contents:
        """Raises: Damaged, also where the file is missing or ends early."""
        try:
            content = io.BufferedReader(FileRange(self.file(blob.file), blob))
            return examine(content, blob.length)
        except OSError as error:
            raise Damaged(f"{blob.file}: {error.strerror or error}") from None

    def read(self, name: str, offset: int, view: memoryview) -> None:
        """Raises: OSError, EOFError."""
        file = self.file(name)
        file.seek(offset)
        read_exactly(file, view)  # type: ignore[arg-type]


class StoredTensor:
    """A tensor of the dense checkpoint, read in boxes."""

    def __init__(self, checkpoint: Checkpoint, files: DataFiles, key: str) -> None:
        self.checkpoint, self.files, self.key = checkpoint, files, key
        self.stored = checkpoint.tensors[key]

    def place(self, box: Box) -> Place | None:
        for chunk, _ in self.stored.overlapping(box):
            if chunk.box == box:
                return self.files.place(chunk.blob)
        return None

    def read(self, box: Box) -> np.ndarray:
        """Raises: UserError, where the dense checkpoint is damaged."""
        return as_words(self.checkpoint.read_box(self.key, box))


class ComputedTensor:
    """A tensor of computed values; the box computed last is kept."""

    def __init__(self, values: Computed) -> None:
        self.computed = values
        self._last: tuple[Box, np.ndarray] | None = None

    def place(self, box: Box) -> Place | None:
        return None

    def read(self, box: Box) -> np.ndarray:
        parts = [(whole, part) for whole in self.computed.boxes(box) if (part := whole.overlap(box))]
        made = [self._values(whole)[part.within(whole.offsets)] for whole, part in parts]
        if len(made) == 1:
            return made[0]
        joined: np.ndarray = np.empty(box.sizes, made[0].dtype)
        for (_, part), values in zip(parts, made, strict=True):
            joined[part.within(box.offsets)] = values
        return joined

    def _values(self, box: Box) -> np.ndarray:
        if self._last is None or self._last[0] != box:
            self._last = box, as_words(self.computed.values(box)).reshape(box.sizes)
        return self._last[1]


class Sources:
    """The sources that ``Origin`` names: tensors of ``checkpoint`` by key, and computed ones."""

    def __init__(self, checkpoint: Checkpoint, files: DataFiles) -> None:
        self.checkpoint, self.files = checkpoint, files
        self._sources: dict[str | Computed, StoredTensor | ComputedTensor] = {}

    def __getitem__(self, name: str | Computed) -> StoredTensor | ComputedTensor:
        if name not in self._sources:
            self._sources[name] = (
                StoredTensor(self.checkpoint, self.files, name)
                if isinstance(name, str)
                else ComputedTensor(name)
            )
        return self._sources[name]


def as_words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, as unsigned integers of its dtype's size."""
    tensor = tensor.contiguous()
    return tensor.flatten().view(torch.uint8).numpy().view(WORDS[tensor.dtype.itemsize]).reshape(tensor.shape)
