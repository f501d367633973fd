"""Read every chunk of a checkpoint in blocks and compare it with what it must be.

Each block of bytes goes into the chunk's checksum, is looked through for NaN and infinity, and is compared
with its expectation. Chunks that must be equal, such as the experts', are read side by side, so that the
dense values are read once for all of them. Where a chunk names the very bytes of the dense checkpoint (a
hard link), that proves them equal; the bytes are read all the same, for their checksum.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.finite import WORDS, all_finite
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk
from megatron_router_upcycling.checkpoint.format.torch_save_file import Contents, Damaged
from megatron_router_upcycling.checkpoint.names import EXPERTS, is_of_layers, split_key
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.expected import Expected, Origin
from megatron_router_upcycling.verify.findings import Findings, span
from megatron_router_upcycling.verify.sources import DataFiles, Sources, as_words

BLOCK_BYTES = 2 << 20  # stays in a processor's cache between the checksum and the comparison

Progress = Callable[[int], None]


@dataclass
class _Stream:
    """A range of bytes that is being read, what it holds, and what was seen so far."""

    blob: Blob
    contents: Contents
    chunks: list[Chunk]  # that are stored there
    linked: bool  # a hard link to the dense checkpoint's bytes, so equal to them
    checksum: int = 0
    finite: bool = True
    different: int = 0
    first: Shape = ()  # place in the chunk of the first value that differs


@dataclass
class _Group:
    """Chunks of one shape that must hold the same values, by the bytes that they name.

    Of the first of them: where it begins, and where its values come from (None: nothing is known of them).
    """

    offsets: Shape
    expected: Expected | None
    chunks: dict[Blob, list[Chunk]] = field(default_factory=dict)


class Comparison:
    """Compares the tensors of ``moe`` with ``sources``, in turn; what is wrong goes to ``findings``.

    ``identities`` collects what every chunk's bytes hold, ``compared`` the bytes that were found equal or
    not for each check, ``linked`` those of them that are the dense checkpoint's own, ``read`` all bytes.
    """

    def __init__(
        self, moe: Checkpoint, files: DataFiles, sources: Sources, findings: Findings, progress: Progress
    ) -> None:
        self.moe, self.files, self.sources = moe, files, sources
        self.findings, self.progress = findings, progress
        self.identities: dict[Blob, bytes] = {}
        self.compared: dict[str, int] = {}
        self.linked = self.read = 0
        self._buffer: np.ndarray = np.empty(BLOCK_BYTES, np.uint8)

    def compare(self, key: str, expected: Expected | None) -> None:
        """Read tensor ``key`` and compare it; without ``expected`` it is read alone."""
        for group in self._groups(key, expected):
            streams = [self._open(key, blob, chunks, group) for blob, chunks in group.chunks.items()]
            opened = [stream for stream in streams if stream is not None]
            plain = [stream for stream in opened if stream.contents.values]
            if plain:
                self._read(key, plain, group)
            for stream in opened:
                if not stream.contents.values:
                    self._read_whole(key, stream, group)
                self._report(key, expected, stream)

    def _groups(self, key: str, expected: Expected | None) -> Iterator[_Group]:
        groups: dict[object, _Group] = {}
        for chunk in self.moe.tensors[key].chunks:
            same = tuple(
                (tuple(map(int.__sub__, box.offsets, chunk.offsets)), box.sizes, source, place)
                for box, source, place in _origins(expected, Box(chunk.offsets, chunk.sizes))
            )
            group = groups.setdefault((chunk.sizes, same or chunk.blob), _Group(chunk.offsets, expected))
            group.chunks.setdefault(chunk.blob, []).append(chunk)
        yield from groups.values()

    def _open(self, key: str, blob: Blob, chunks: list[Chunk], group: _Group) -> _Stream | None:
        dtype, sizes = self.moe.tensors[key].dtype, chunks[0].sizes
        try:
            contents = self.files.examine(blob)
            if contents.values and (contents.dtype, contents.sizes) != (dtype, sizes):
                raise Damaged(
                    f"holds {contents.dtype} {list(contents.sizes or ())} where .metadata promises {dtype}"
                    f" {list(sizes)}"
                )
        except Damaged as error:
            self._damaged(key, blob, chunks, error)
            self.progress(math.prod(sizes) * dtype.itemsize)
            return None
        self.identities[blob] = contents.identity
        origins = _origins(group.expected, Box(group.offsets, sizes))
        place = self.sources[origins[0].source].place(origins[0].place) if len(origins) == 1 else None
        return _Stream(blob, contents, chunks, linked=place == self.files.place(blob))

    def _read(self, key: str, streams: list[_Stream], group: _Group) -> None:
        """Read plain values, all streams a block at a time."""
        dtype, sizes = self.moe.tensors[key].dtype, streams[0].chunks[0].sizes
        all_linked, done = all(stream.linked for stream in streams), 0
        for block in blocks(Box((0,) * len(sizes), sizes), BLOCK_BYTES // dtype.itemsize):
            expected = [] if all_linked else self._expected(group, block)
            view = memoryview(self._buffer)[: math.prod(block.sizes) * dtype.itemsize]
            words: np.ndarray = np.frombuffer(view, WORDS[dtype.itemsize]).reshape(block.sizes)
            for stream in streams:
                assert stream.contents.values is not None
                begin = stream.blob.offset + stream.contents.values.offset + done
                try:
                    self.files.read(stream.blob.file, begin, view)
                except (OSError, EOFError) as error:
                    self._damaged(key, stream.blob, stream.chunks, error)
                    continue
                stream.checksum = zlib.crc32(view, stream.checksum)
                stream.finite &= all_finite(words, dtype)
                if not stream.linked:
                    _compare(stream, block, words, expected)
                self.progress(len(view))
            done += len(view)
        for stream in streams:
            assert stream.contents.values is not None
            if stream.checksum != stream.contents.values.checksum:
                self._damaged(key, stream.blob, stream.chunks, "the values do not match their checksum")

    def _read_whole(self, key: str, stream: _Stream, group: _Group) -> None:
        """Values that do not lie row after row: PyTorch reads them, all at once."""
        dtype = self.moe.tensors[key].dtype
        try:
            words = as_words(self.moe.read_chunk(stream.chunks[0], dtype, bytearray()))
        except Exception as error:  # whatever torch.load raises on damaged bytes
            self._damaged(key, stream.blob, stream.chunks, error)
            return
        stream.finite = all_finite(words, dtype)
        whole = Box((0,) * words.ndim, words.shape)
        _compare(stream, whole, words, self._expected(group, whole))
        self.progress(words.nbytes)

    def _expected(self, group: _Group, block: Box) -> list[tuple[Box, np.ndarray]]:
        """The parts of a block of the group's chunks that something is known of, and their values."""
        begin = tuple(map(int.__add__, group.offsets, block.offsets))
        return [
            (
                Box(tuple(map(int.__sub__, box.offsets, group.offsets)), box.sizes),
                self.sources[source].read(place).reshape(box.sizes),
            )
            for box, source, place in _origins(group.expected, Box(begin, block.sizes))
        ]

    def _report(self, key: str, expected: Expected | None, stream: _Stream) -> None:
        stored = self.moe.tensors[key]
        nbytes = math.prod(stream.chunks[0].sizes) * stored.dtype.itemsize
        self.read += nbytes
        self.linked += nbytes * stream.linked
        layer, expert = where(key, stream.chunks)
        if not stream.finite:
            self.findings.add("finite", key, "NaN or infinity", layer, expert)
        if expected is not None:
            self.compared[expected.check] = self.compared.get(expected.check, 0) + nbytes
            if stream.different:
                first = list(map(int.__add__, stream.first, stream.chunks[0].offsets))
                what = f"{stream.different} values differ, the first at {first}"
                self.findings.add(expected.check, key, what, layer, expert)

    def _damaged(self, key: str, blob: Blob, chunks: list[Chunk], why: object) -> None:
        what = f"{blob.file}, {blob.length} bytes at {blob.offset}: {why}"
        self.findings.add("damage", key, what, *where(key, chunks))


def blocks(box: Box, most: int) -> Iterator[Box]:
    """Cut a box into blocks of at most ``most`` elements, in the order in which elements lie in memory."""
    if math.prod(box.sizes) <= most:
        yield box
        return
    axis = next(axis for axis, size in enumerate(box.sizes) if size > 1)
    step = max(1, most // math.prod(box.sizes[axis + 1 :]))
    for start in range(0, box.sizes[axis], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[axis] += start
        sizes[axis] = min(step, box.sizes[axis] - start)
        yield from blocks(Box(tuple(offsets), tuple(sizes)), most)


def where(key: str, chunks: list[Chunk]) -> tuple[str, str]:
    """The layers and the experts of chunks, as words; empty where the tensor has none."""
    if not is_of_layers(key):
        return "", ""

    def along(axis: int) -> str:
        return span(
            index
            for chunk in chunks
            for index in range(chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis])
        )

    name, layer = split_key(key)
    layers = along(0) if layer is None else str(layer)
    experts = along(int(layer is None)) if name.startswith(EXPERTS) else ""
    return layers, experts


def _origins(expected: Expected | None, box: Box) -> list[Origin]:
    return list(expected.origins(box)) if expected else []


def _compare(stream: _Stream, block: Box, words: np.ndarray, expected: list[tuple[Box, np.ndarray]]) -> None:
    for part, values in expected:
        differs = words[part.within(block.offsets)] != values
        if count := int(np.count_nonzero(differs)):
            if not stream.different:
                index = np.unravel_index(int(differs.argmax()), differs.shape)
                stream.first = tuple(int(i) + offset for i, offset in zip(index, part.offsets, strict=True))
            stream.different += count
