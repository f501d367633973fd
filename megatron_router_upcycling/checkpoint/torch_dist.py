"""Read Megatron's torch_dist checkpoints, which are torch.distributed.checkpoint folders, chunk by chunk."""

import functools
import hashlib
import io
import math
import os
from argparse import Namespace
from dataclasses import dataclass, field
from operator import mul, sub
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import described
from megatron_router_upcycling.checkpoint.format import files, metadata, torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.metadata import METADATA, Blob, Chunk, Report, StoredTensor
from megatron_router_upcycling.checkpoint.names import EMBEDDING
from megatron_router_upcycling.errors import UserError, error_as, reason


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a checkpoint, open for reading.

    ``tensors`` and ``objects`` (extra states and the like) are by global key; ``common`` is the state
    that all ranks share, with Megatron's arguments in it. ``config``: a YAML file that describes the model.
    """

    root: Path
    iteration_dir: Path
    tensors: dict[str, StoredTensor]
    objects: dict[str, Blob]
    common: dict[str, Any]
    config: Path | None = field(default=None, kw_only=True)
    _found: dict[tuple[Blob, Shape, torch.dtype], torch_save_file.Values | None] = field(
        default_factory=dict, init=False, repr=False
    )  # cache of ``find_values``

    @classmethod
    def open_folder(cls, root: Path, folder: Path, report: Report | None = None) -> "Checkpoint":
        content = files.read_record(folder / METADATA)
        checkpoint = cls(root, folder, *metadata.parse_metadata(content, folder / METADATA, report), {})
        checkpoint.check_files(report)
        try:
            checkpoint.common.update(checkpoint._read_common())
        except (UserError, OSError) as error:
            if report is None:
                raise
            report(files.COMMON_STATE, f"cannot be read ({error})")
        return checkpoint

    @property
    def args(self) -> Namespace:
        """Megatron's arguments of the run that saved this checkpoint; without any, see ``described``."""
        return self._description[0]

    @property
    def described_by(self) -> str:
        return self._description[1]

    @functools.cached_property
    def _description(self) -> tuple[Namespace, str]:
        args, folder = self.common.get("args"), self.iteration_dir
        if isinstance(args, Namespace) and not all(isinstance(name, str) for name in vars(args)):
            args = None
        if described.gives_architecture(args):
            if self.config:
                described.check(self.config, args, self.root)
            return args, f"the training arguments in {folder}"
        found, source = described.find(self.root, folder, self.config)
        if EMBEDDING in self.tensors:
            stored = self.tensors[EMBEDDING]
            found.padded_vocab_size, found.params_dtype = stored.shape[0], stored.dtype
        return found, source

    def blobs(self, key: str) -> list[Blob]:
        if key in self.objects:
            return [self.objects[key]]
        return [chunk.blob for chunk in self.tensors[key].chunks]

    def stored_bytes(self, key: str) -> int:
        return sum(blob.length for blob in self.blobs(key))

    def is_verbatim(self, key: str) -> bool:
        """Whether a torch_dist checkpoint can reuse the stored bytes of a tensor or an object."""
        return key in self.objects or all(chunk.stored is None for chunk in self.tensors[key].chunks)

    def largest_chunk(self, key: str) -> int:
        stored = self.tensors[key]
        return max(math.prod(chunk.sizes) for chunk in stored.chunks) * stored.dtype.itemsize

    def digest(self) -> str:
        """SHA-256 over ``.metadata`` and the common state: a checkpoint's identity, cheap to compute."""
        content = files.read_record(self.iteration_dir / METADATA)
        return hashlib.sha256(content + self._common_bytes()).hexdigest()

    def read_blob(self, blob: Blob) -> bytes:
        with open(self.iteration_dir / blob.file, "rb") as file:
            file.seek(blob.offset)
            return file.read(blob.length)

    def find_values(self, chunk: Chunk, dtype: torch.dtype) -> torch_save_file.Values | None:
        """Where a chunk's values lie in its data file, or None where they do not lie row after row."""
        place = chunk.blob, chunk.sizes, dtype
        if place not in self._found:
            self._found[place] = self._find_values(chunk, dtype)
        return self._found[place]

    def _find_values(self, chunk: Chunk, dtype: torch.dtype) -> torch_save_file.Values | None:
        promised = chunk.stored_sizes, dtype
        try:
            return torch_save_file.examine(self.iteration_dir, chunk.blob, promised).values
        except torch_save_file.Damaged as error:
            raise self._damaged(chunk, error) from None

    def _damaged(self, chunk: Chunk, error: Exception) -> UserError:
        where = f"{self.iteration_dir / chunk.blob.file}: damaged at byte {chunk.blob.offset}"
        return UserError(f"{where} ({reason(error)}); use another copy")

    def read_chunk(self, chunk: Chunk, dtype: torch.dtype, scratch: bytearray) -> torch.Tensor:
        """A chunk's values, in ``scratch`` where they fit: valid until it is used again."""
        values = tensor_in(scratch, dtype, chunk.sizes)
        self.read_part(chunk, chunk.box, values)
        return values

    def read_layer(self, key: str, layer: int, scratch: bytearray) -> torch.Tensor:
        """``tensor[layer]`` of a tensor stacked over layers; in ``scratch`` as in ``read_chunk``."""
        _, *sizes = self.tensors[key].shape
        values = tensor_in(scratch, self.tensors[key].dtype, (1, *sizes))
        return self.read_box(key, Box((layer, *(0 for _ in sizes)), (1, *sizes)), values)[0]

    def read_box(self, key: str, box: Box | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A box of a tensor (default: all of it), assembled from its chunks; in ``out`` if given."""
        stored = self.tensors[key]
        box = box or Box((0,) * len(stored.shape), stored.shape)
        values = torch.empty(box.sizes, dtype=stored.dtype) if out is None else out
        for chunk, part in stored.overlapping(box):
            self.read_part(chunk, part, values[part.within(box.offsets)])
        return values

    def read_part(self, chunk: Chunk, part: Box, out: torch.Tensor) -> None:
        """Fill ``out`` with ``part``, a box in ``chunk``, by one read from its first to its last value."""
        if not out.numel():
            return
        values = self.find_values(chunk, out.dtype)
        if values is None:
            out.copy_(self._load(chunk, out.dtype)[part.within(chunk.offsets)])
            return
        steps = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        begin = sum(map(mul, map(sub, part.offsets, chunk.offsets), steps))
        count = 1 + sum((size - 1) * step for size, step in zip(part.sizes, steps, strict=True))
        straight = out.is_contiguous() and count == out.numel()
        read = out.view(-1) if straight else torch.empty(count, dtype=out.dtype)
        path = self.iteration_dir / chunk.blob.file
        with error_as((OSError, EOFError), f"{path}: cannot be read"), open(path, "rb") as file:
            file.seek(values.offset + begin * out.itemsize)
            files.read_exactly(file, memoryview(read.view(torch.uint8).numpy()))
        if not straight:
            out.copy_(read.as_strided(part.sizes, steps))

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """The values of a chunk that do not lie row after row in its file."""
        try:
            with open(self.iteration_dir / chunk.blob.file, "rb", buffering=0) as file:
                content = io.BufferedReader(files.FileRange(file, chunk.blob))
                tensor = torch.load(content, map_location="cpu", weights_only=True)
            found = tuple(tensor.shape), tensor.dtype, tensor.layout, tensor.device.type
            if found != (chunk.stored_sizes, dtype, torch.strided, "cpu"):
                raise ValueError(f"not the {dtype} {list(chunk.stored_sizes)} that {METADATA} promises")
        except Exception as error:  # whatever torch.load raises on damaged bytes
            raise self._damaged(chunk, error) from None
        return tensor.detach().reshape(chunk.sizes)

    def check_files(self, report: Report | None) -> None:
        """Check that data files exist and are long enough; faults go to ``report``, or raise UserError."""
        needed: dict[str, int] = {}
        for key in (*self.tensors, *self.objects):
            for blob in self.blobs(key):
                needed[blob.file] = max(needed.get(blob.file, 0), blob.offset + blob.length)
        for name, end in sorted(needed.items()):
            path = self.iteration_dir / name
            size = path.stat().st_size if os.path.isfile(path) else -1  # also for an invalid name
            if size < end:
                fault = "missing" if size < 0 else f"half-written ({size} bytes of at least {end})"
                if report is None:
                    raise UserError(f"{path}: {fault}; use a checkpoint that was saved whole")
                report(name, fault)

    def _common_bytes(self) -> bytes:
        if blob := self.objects.get(files.COMMON_STATE):
            if blob.length > files.LARGEST_RECORD:
                raise UserError(f"{self.iteration_dir}: common state of {blob.length} bytes")
            return self.read_blob(blob)
        return files.read_record(self.iteration_dir / files.COMMON_FILE)

    def _read_common(self) -> dict[str, Any]:
        source = f"{self.iteration_dir}: common state"
        common = torch_save_file.load(self._common_bytes(), source)
        if files.COMMON_STATE in self.objects:
            common = common[0] if isinstance(common, list) and len(common) == 1 else None
        if not isinstance(common, dict):
            raise UserError(f"{source}: not a dictionary; use a checkpoint that Megatron's training saved")
        return common


def tensor_in(scratch: bytearray, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """An uninitialised tensor in ``scratch``, or in new memory if it does not fit."""
    count = math.prod(shape)
    if not 0 < count * dtype.itemsize <= len(scratch):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(scratch, dtype=dtype, count=count).view(shape)
