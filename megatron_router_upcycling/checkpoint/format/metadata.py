"""A torch_dist checkpoint's ``.metadata``: its tensors, and where their chunks are stored.

It is a pickle that maps every chunk to a range of a data file. The range is itself a ``torch.save`` file.
"""

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.format import boxes, safe_pickle
from megatron_router_upcycling.errors import UserError, described, error_as, shown

METADATA = ".metadata"

Report = Callable[[str, str], None]  # takes a tensor's or file's name, and what is wrong with it
DCP = "torch.distributed.checkpoint"
DCP_VERSION = "1.0.0"
MALFORMED = (AttributeError, AssertionError, LookupError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class Blob:
    """A range of bytes in a data file: one ``torch.save`` file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor and where its values are stored.

    The blob is a ``torch.save`` file of a tensor of shape ``sizes``, or of shape ``stored`` if given: the
    same values in the same order, which a checkpoint that declares them as ``sizes`` must store anew.
    """

    offsets: boxes.Shape
    sizes: boxes.Shape
    blob: Blob
    stored: boxes.Shape | None = None

    @property
    def box(self) -> boxes.Box:
        return boxes.Box(self.offsets, self.sizes)

    @property
    def stored_sizes(self) -> boxes.Shape:
        return self.sizes if self.stored is None else self.stored


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor: its shape, its dtype, and the chunks that make it up."""

    shape: boxes.Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def _in_order(self) -> tuple[list[Chunk], list[boxes.Shape], int]:
        """The chunks sorted by their offsets; on the first axis, where they begin and their largest size."""
        chunks = sorted(self.chunks, key=lambda chunk: chunk.offsets)
        starts = [chunk.offsets[:1] for chunk in chunks]
        return chunks, starts, max((size for chunk in chunks for size in chunk.sizes[:1]), default=0)

    def overlapping(self, box: boxes.Box) -> Iterator[tuple[Chunk, boxes.Box]]:
        """The chunks that hold a part of ``box``, each with that part; found by bisection."""
        chunks, starts, longest = self._in_order
        low = tuple(place - longest + 1 for place in box.offsets[:1])
        high = tuple(end - 1 for end in box.ends[:1])
        for chunk in chunks[bisect_left(starts, low) : bisect_right(starts, high)]:
            if part := box.overlap(chunk.box):
                yield chunk, part


def parse_metadata(
    content: bytes, source: Any, report: Report | None = None, *, to_train: bool = False
) -> tuple[dict[str, StoredTensor], dict[str, Blob]]:
    """Tensors and objects by key, from the bytes of a ``.metadata`` file.

    ``report``: called with (key, fault), instead of raising, for inconsistencies and unused bytes; the usable
    entries are returned. ``to_train``: refuse what the installed PyTorch cannot load.
    """

    def fault(key: str, what: str) -> None:
        if report is None:
            raise UserError(f"{source}: {key} {what}; the checkpoint is damaged or incomplete")
        report(key, what)

    if to_train:  # which imports it in any case; here it would take half a second
        from torch.distributed.checkpoint.metadata import TensorProperties

    metadata = safe_pickle.loads(content, source)
    with error_as(MALFORMED, f"{source}: not a checkpoint's metadata", say=described):
        stored = metadata.state["storage_data"]
        blobs = {
            (index.state["fqn"], _sizes(index.state.get("offset"))): _blob(info.state)
            for index, info in stored.items()
        }
        tensors: dict[str, StoredTensor] = {}
        objects: dict[str, Blob] = {}
        unnamed = dict(blobs)
        for key, entry in metadata.state["state_dict_metadata"].items():
            if not isinstance(key, str):
                raise TypeError(f"an entry is called {shown(key)}")
            if type(entry).__name__ == "TensorStorageMetadata":
                if to_train and len(entry.state["properties"].state) > len(TensorProperties().__getstate__()):
                    later = f"a later torch than {torch.__version__}, which cannot load it"
                    raise UserError(f"{source}: was saved by {later}; train with torch 2.15 or later")
                tensors[key] = _stored_tensor(key, entry.state, blobs, fault)
                for chunk in tensors[key].chunks:
                    unnamed.pop((key, chunk.offsets), None)
            elif blob := unnamed.pop((key, None), None):
                objects[key] = blob
            else:
                fault(key, "has no bytes")
    if report is not None:
        for key, offsets in unnamed:
            report(key, f"has bytes for a chunk at {list(offsets or ())} that it does not have")
        if len(stored) > len(blobs):
            report(METADATA, f"has {len(stored) - len(blobs)} chunks' bytes twice")
    return tensors, objects


def _stored_tensor(key: str, state: dict[str, Any], blobs: dict[Any, Blob], fault: Report) -> StoredTensor:
    dtype, shape = state["properties"].state[0], _sizes(state["size"])
    if not isinstance(dtype, torch.dtype) or shape is None:
        raise TypeError(f"{key} has dtype {shown(dtype)} and shape {shape}")
    chunks = []
    for record in state["chunks"]:
        offsets, sizes = _sizes(record.state["offsets"]), _sizes(record.state["sizes"])
        assert offsets is not None and sizes is not None
        blob, place = blobs.get((key, offsets)), f"its chunk at {list(offsets)} of {list(sizes)}"
        if not boxes.is_inside(shape, boxes.Box(offsets, sizes)):
            fault(key, f"{list(shape)} does not hold {place}")
        elif blob is None or math.prod(sizes) * dtype.itemsize > blob.length:
            fault(key, f"has {blob.length if blob else 'no'} bytes for {place}")
        else:
            chunks.append(Chunk(offsets, sizes, blob))
    for count, box in boxes.faults(shape, [chunk.box for chunk in chunks]):
        how = f"has {count} chunks" if count else "is not covered by its chunks"
        fault(key, f"{list(shape)} {how} at {list(box.offsets)} of {list(box.sizes)}")
    return StoredTensor(shape, dtype, tuple(chunks))


def _sizes(value: Any) -> boxes.Shape | None:
    return None if value is None else tuple(int(size) for size in value)


def _blob(state: dict[str, Any]) -> Blob:
    name = state["relative_path"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"names the data file {shown(name)}, which is outside the checkpoint's folder")
    if state.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed; save the checkpoint without stream transforms")
    blob = Blob(name, int(state["offset"]), int(state["length"]))
    if blob.offset < 0 or blob.length < 0:
        raise ValueError(f"{name} has a negative range")
    return blob


def format_metadata(tensors: dict[str, StoredTensor], objects: dict[str, Blob]) -> bytes:
    """The bytes of a ``.metadata`` file (torch.distributed.checkpoint.metadata.Metadata, pickled)."""

    def record(name: str, **state: Any) -> Any:
        return safe_pickle.inert(f"{DCP}.metadata", name, state=state)

    # Equal values (equal experts' blobs, chunks' sizes) are one object, so that they are pickled once.
    @functools.cache
    def info(blob: Blob) -> Any:
        state = {"relative_path": blob.file, "offset": blob.offset, "length": blob.length}
        return safe_pickle.inert(f"{DCP}.filesystem", "_StorageInfo", state=state)

    size = functools.cache(torch.Size)
    contiguous = safe_pickle.inert(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING", 0)
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, stored in tensors.items():
        # PyTorch up to 2.14 reads exactly these five; 2.15 writes strides as a sixth and reads either.
        properties = (stored.dtype, torch.strided, False, contiguous, False)
        chunks = []
        for chunk in stored.chunks:
            offsets = size(chunk.offsets)
            chunks.append(record("ChunkStorageMetadata", offsets=offsets, sizes=size(chunk.sizes)))
            storage[record("MetadataIndex", fqn=key, offset=offsets, index=None)] = info(chunk.blob)
        entries[key] = record(
            "TensorStorageMetadata",
            properties=safe_pickle.inert(f"{DCP}.metadata", "TensorProperties", state=properties),
            size=size(stored.shape),
            chunks=chunks,
        )
    for key, blob in objects.items():
        entries[key] = record("BytesStorageMetadata")
        storage[record("MetadataIndex", fqn=key, offset=None, index=None)] = info(blob)
    parts = {"state_dict_metadata": entries, "planner_data": None, "storage_data": storage}
    return safe_pickle.dumps(record("Metadata", **parts, storage_meta=None, version=DCP_VERSION))
