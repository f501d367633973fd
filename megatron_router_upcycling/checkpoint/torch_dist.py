"""Read Megatron's torch_dist checkpoints chunk by chunk.

A checkpoint root holds ``latest_checkpointed_iteration.txt`` and the folder that it names; that folder
is a torch.distributed.checkpoint folder with global tensors; its ``.metadata`` says where they are stored.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import mul, sub
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint import described
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.files import (
    COMMON_FILE,
    COMMON_STATE,
    LARGEST_RECORD,
    FileRange,
    read_exactly,
    read_record,
)
from megatron_router_upcycling.checkpoint.format.metadata import (
    METADATA,
    Blob,
    Chunk,
    Report,
    StoredTensor,
    parse_metadata,
)
from megatron_router_upcycling.checkpoint.format.torch_save_file import Values, find_values
from megatron_router_upcycling.checkpoint.names import EMBEDDING
from megatron_router_upcycling.errors import UserError, reason


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
    # Where the values of the chunks that were read lie.
    _values: dict[tuple[Blob, Shape], Values | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open_folder(cls, root: Path, folder: Path, report: Report | None = None) -> "Checkpoint":
        """Open one iteration's torch_dist folder and check that it is whole; see ``open_checkpoint``."""
        metadata = folder / METADATA
        tensors, objects = parse_metadata(read_record(metadata), metadata, report)
        checkpoint = cls(root, folder, tensors, objects, {})
        checkpoint.check_files(report)
        try:
            checkpoint.common.update(checkpoint._read_common())
        except (UserError, OSError) as error:
            if report is None:
                raise
            report(COMMON_STATE, f"cannot be read ({error})")
        return checkpoint

    @property
    def args(self) -> Namespace:
        """Megatron's arguments as the run that saved this checkpoint had them; else see ``described``."""
        return self._description[0]

    @property
    def described_by(self) -> str:
        """What ``args`` are from, for messages."""
        return self._description[1]

    @functools.cached_property
    def _description(self) -> tuple[Namespace, str]:
        args = self.common.get("args")
        if isinstance(args, Namespace) and not all(isinstance(name, str) for name in vars(args)):
            args = None
        if described.gives_architecture(args):
            if self.config:
                described.check(self.config, args, self.root)
            return args, f"the training arguments in {self.iteration_dir}"
        if found := described.find(self.root, self.iteration_dir, self.config):
            if EMBEDDING in self.tensors:
                stored = self.tensors[EMBEDDING]
                found[0].padded_vocab_size, found[0].params_dtype = stored.shape[0], stored.dtype
            return found
        what = "training arguments that are not Megatron's" if args else "no training arguments"
        files = f"no {described.RUN_CONFIG} and no {described.CONFIG_JSON}"
        raise UserError(f"{self.iteration_dir}: holds {what}, {files}; {described.WAY_OUT}")

    def blobs(self, key: str) -> list[Blob]:
        """Where the values of a tensor or an object are stored."""
        if key in self.objects:
            return [self.objects[key]]
        return [chunk.blob for chunk in self.tensors[key].chunks]

    def stored_bytes(self, key: str) -> int:
        """Bytes on disk of a tensor or an object."""
        return sum(blob.length for blob in self.blobs(key))

    def is_verbatim(self, key: str) -> bool:
        """Whether a torch_dist checkpoint can take over the bytes of a tensor or an object."""
        return key in self.objects or all(chunk.verbatim for chunk in self.tensors[key].chunks)

    def largest_chunk(self, key: str) -> int:
        """Bytes of a tensor's largest chunk."""
        stored = self.tensors[key]
        return max(math.prod(chunk.sizes) for chunk in stored.chunks) * stored.dtype.itemsize

    def digest(self) -> str:
        """SHA-256 over ``.metadata`` and the common state: a checkpoint's identity, cheap to compute."""
        digest = hashlib.sha256(read_record(self.iteration_dir / METADATA))
        digest.update(self._common_bytes())
        return digest.hexdigest()

    def read_blob(self, blob: Blob) -> bytes:
        with open(self.iteration_dir / blob.file, "rb") as file:
            file.seek(blob.offset)
            return file.read(blob.length)

    def find_values(self, chunk: Chunk, dtype: torch.dtype) -> Values | None:
        """Where a chunk's values lie in its data file, or None where they are not plainly there."""
        with self._open_blob(chunk.blob) as content:
            found = find_values(content, chunk.stored_sizes, dtype)
        return found and replace(found, offset=chunk.blob.offset + found.offset)

    def read_chunk(self, chunk: Chunk, dtype: torch.dtype, scratch: bytearray) -> torch.Tensor:
        """A chunk's values, in ``scratch`` where they fit (until it is used again)."""
        values = tensor_in(scratch, dtype, chunk.sizes)
        self.read_part(chunk, chunk.box, values)
        return values

    def read_layer(self, key: str, layer: int, scratch: bytearray) -> torch.Tensor:
        """``tensor[layer]`` of a tensor stacked over layers; in ``scratch`` as in ``read_chunk``."""
        _, *sizes = self.tensors[key].shape
        values = tensor_in(scratch, self.tensors[key].dtype, (1, *sizes))
        return self.read_box(key, Box((layer, *(0 for _ in sizes)), (1, *sizes)), values)[0]

    def read_box(self, key: str, box: Box | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A box of a tensor, whatever chunks it is stored in: those that Megatron's ranks held.

        Args:
            box: default: the whole tensor.
            out: of the box's sizes and the tensor's dtype; is filled and returned.
        """
        stored = self.tensors[key]
        box = box or Box((0,) * len(stored.shape), stored.shape)
        values = torch.empty(box.sizes, dtype=stored.dtype) if out is None else out
        for chunk, part in stored.overlapping(box):
            self.read_part(chunk, part, values[part.within(box.offsets)])
        return values

    def read_part(self, chunk: Chunk, part: Box, out: torch.Tensor) -> None:
        """Fill ``out`` with ``part``, a box of the tensor that lies in ``chunk``.

        Read is what lies between the first and the last of its values, straight into ``out`` where it can be.
        """
        if not out.numel():
            return
        place = chunk.blob, chunk.sizes
        if place not in self._values:
            self._values[place] = self.find_values(chunk, out.dtype)
        values = self._values[place]
        if values is None:
            out.copy_(self._load(chunk, out.dtype)[part.within(chunk.offsets)])
            return
        steps = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        begin = sum(map(mul, map(sub, part.offsets, chunk.offsets), steps))
        count = 1 + sum((size - 1) * step for size, step in zip(part.sizes, steps, strict=True))
        straight = out.is_contiguous() and count == out.numel()
        read = out.view(-1) if straight else torch.empty(count, dtype=out.dtype)
        path = self.iteration_dir / chunk.blob.file
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(values.offset + begin * out.itemsize)
                read_exactly(file, memoryview(read.view(torch.uint8).numpy()))
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        if not straight:
            out.copy_(read.as_strided(part.sizes, steps))

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """The values of a chunk that do not lie row after row in its file."""
        with self._open_blob(chunk.blob) as content:
            tensor = torch.load(content, map_location="cpu", weights_only=True)
            if (
                not isinstance(tensor, torch.Tensor)
                or tuple(tensor.shape) != chunk.stored_sizes
                or tensor.dtype != dtype
                or tensor.layout != torch.strided
                or tensor.device.type != "cpu"
            ):
                raise ValueError(f"not the {dtype} {list(chunk.stored_sizes)} that {METADATA} promises")
        return tensor.detach().reshape(chunk.sizes)

    @contextlib.contextmanager
    def _open_blob(self, blob: Blob) -> Iterator[BinaryIO]:
        """A blob as a file of its own; whatever fails on its content is the user's damaged file."""
        path = self.iteration_dir / blob.file
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        with file:
            try:
                yield io.BufferedReader(FileRange(file, blob))
            except Exception as error:
                raise UserError(
                    f"{path}: damaged at byte {blob.offset} ({reason(error)}); use another copy"
                ) from None

    def check_files(self, report: Report | None) -> None:
        """Whether each data file is there and as long as the metadata says; faults go to ``report``."""
        needed: dict[str, int] = {}
        for key in (*self.tensors, *self.objects):
            for blob in self.blobs(key):
                needed[blob.file] = max(needed.get(blob.file, 0), blob.offset + blob.length)
        for name, end in sorted(needed.items()):
            path = self.iteration_dir / name
            if not os.path.isfile(path):  # False for a name that cannot be one, too
                fault = "missing; the checkpoint is incomplete, use one that was saved whole"
            elif path.stat().st_size < end:
                fault = (
                    f"half-written ({path.stat().st_size} bytes of at least {end});"
                    " use a checkpoint that was saved whole"
                )
            else:
                continue
            if report is None:
                raise UserError(f"{path}: {fault}")
            report(name, fault.split(";")[0])

    def _common_bytes(self) -> bytes:
        if COMMON_STATE in self.objects:
            blob = self.objects[COMMON_STATE]
            if blob.length > LARGEST_RECORD:
                raise UserError(f"{self.iteration_dir}: common state of {blob.length} bytes")
            return self.read_blob(blob)
        return read_record(self.iteration_dir / COMMON_FILE)

    def _read_common(self) -> dict[str, Any]:
        is_object = COMMON_STATE in self.objects
        source = f"{self.iteration_dir}: common state" if is_object else str(self.iteration_dir / COMMON_FILE)
        common = torch_save_file.load(self._common_bytes(), source)
        if is_object:
            common = common[0] if isinstance(common, list) and len(common) == 1 else None
        if not isinstance(common, dict):
            raise UserError(f"{source}: not a dictionary; use a checkpoint that Megatron's training saved")
        return common


def tensor_in(scratch: bytearray, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """A tensor in ``scratch``, which is in memory already; of its own where it does not fit."""
    count = math.prod(shape)
    if not 0 < count * dtype.itemsize <= len(scratch):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(scratch, dtype=dtype, count=count).view(shape)
