"""Read every chunk of a checkpoint in blocks and compare it with what it must be.

Each block of bytes goes into the chunk's checksum, is looked through for NaN and infinity, and is compared
with its expectation. Chunks that must be equal, such as the experts', are read side by side, so that the
dense values are read once for all of them. Where a chunk names the very bytes of the dense checkpoint (a
hard link), that proves them equal; the bytes are read all the same, for their checksum.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_router_upcycling.checkpoint.format.boxes import Box, Shape
from megatron_router_upcycling.checkpoint.format.finite import WORDS, all_finite
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk
from megatron_router_upcycling.checkpoint.format.torch_save_check import Contents, Damaged
from megatron_router_upcycling.checkpoint.names import is_of_layers, split_key
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.verify.findings import Findings, span
from megatron_router_upcycling.verify.pieces import ExpectedTensor, Piece
from megatron_router_upcycling.verify.sources import DataFiles, as_words, inside

BLOCK_BYTES = 2 << 20  # stays in a processor's cache between the checksum and the comparison

Progress = Callable[[int], None]


@dataclass
class _Stream:
    """Bytes in the reading: what they hold, the chunks that name them, and what was seen so far."""

    blob: Blob
    contents: Contents
    chunks: list[Chunk]
    linked: bool  # to the bytes that they must be equal to
    checksum: int = 0
    finite: bool = True
    different: int = 0
    first: Shape = ()  # place in the chunk of the first value that differs


@dataclass
class _Group:
    """Chunks of one shape that must hold the same values, by the bytes that they name.

    ``pieces`` begin where the chunk begins; there are none where nothing is known of the values.
    """

    pieces: list[Piece]
    chunks: dict[Blob, list[Chunk]] = field(default_factory=dict)


class Comparison:
    """Compares the tensors of ``moe``, one after the other; what is wrong goes to ``findings``.

    ``identities`` collects what every chunk's bytes hold, ``compared`` the bytes that were found equal or
    not for each check, ``linked`` those of them that are the dense checkpoint's own, ``read`` all bytes.
    """

    def __init__(self, moe: Checkpoint, files: DataFiles, findings: Findings, progress: Progress) -> None:
        self.moe, self.files, self.findings, self.progress = moe, files, findings, progress
        self.identities: dict[Blob, bytes] = {}
        self.compared: dict[str, int] = {}
        self.linked = self.read = 0
        self._buffer: np.ndarray = np.empty(BLOCK_BYTES, np.uint8)

    def compare(self, key: str, expected: ExpectedTensor | None) -> None:
        """Read tensor ``key`` and compare it; without ``expected`` it is read alone.

        Raises:
            UserError: the dense checkpoint is damaged.
        """
        for group in self._groups(key, expected):
            streams = [self._open(key, blob, chunks, group.pieces) for blob, chunks in group.chunks.items()]
            opened = [stream for stream in streams if stream is not None]
            plain = [stream for stream in opened if stream.contents.values]
            if plain:
                self._read(key, plain, group.pieces)
            for stream in opened:
                if not stream.contents.values:
                    self._read_whole(key, stream, group.pieces)
                self._report(key, expected, stream)

    def _groups(self, key: str, expected: ExpectedTensor | None) -> Iterator[_Group]:
        groups: dict[object, _Group] = {}
        for chunk in self.moe.tensors[key].chunks:
            pieces: list[Piece] = []
            if expected:
                for piece in expected.pieces(Box(chunk.offsets, chunk.sizes)):
                    start = tuple(map(int.__sub__, piece.box.offsets, chunk.offsets))
                    pieces.append(replace(piece, box=Box(start, piece.box.sizes)))
            same = tuple((piece.box, piece.name, piece.source_box(piece.box)) for piece in pieces)
            group = groups.setdefault((chunk.sizes, same or chunk.blob), _Group(pieces))
            group.chunks.setdefault(chunk.blob, []).append(chunk)
        yield from groups.values()

    def _open(self, key: str, blob: Blob, chunks: list[Chunk], pieces: list[Piece]) -> _Stream | None:
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
        place = pieces[0].source.place(pieces[0].source_box(pieces[0].box)) if len(pieces) == 1 else None
        return _Stream(blob, contents, chunks, linked=place == self.files.place(blob))

    def _read(self, key: str, streams: list[_Stream], pieces: list[Piece]) -> None:
        """Read plain values, all streams a block at a time."""
        dtype, sizes = self.moe.tensors[key].dtype, streams[0].chunks[0].sizes
        if all(stream.linked for stream in streams):
            pieces = []
        done = 0
        for block in blocks(Box((0,) * len(sizes), sizes), BLOCK_BYTES // dtype.itemsize):
            expected = list(_expected(pieces, block))
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

    def _read_whole(self, key: str, stream: _Stream, pieces: list[Piece]) -> None:
        """Values that do not lie row after row: PyTorch reads them, all at once."""
        dtype = self.moe.tensors[key].dtype
        try:
            words = as_words(self.moe.read_chunk(stream.chunks[0], dtype, bytearray()))
        except Exception as error:  # whatever torch.load raises on damaged bytes
            self._damaged(key, stream.blob, stream.chunks, error)
            return
        stream.finite = all_finite(words, dtype)
        whole = Box((0,) * words.ndim, words.shape)
        _compare(stream, whole, words, list(_expected(pieces, whole)))
        self.progress(words.nbytes)

    def _report(self, key: str, expected: ExpectedTensor | None, stream: _Stream) -> None:
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
    _, layer = split_key(key)
    axes = [
        span(
            index for chunk in chunks for index in range(chunk.offsets[a], chunk.offsets[a] + chunk.sizes[a])
        )
        for a in range((layer is None) + (".experts." in key))
    ]
    axes = axes if layer is None else [str(layer), *axes]
    return axes[0], axes[1] if len(axes) > 1 else ""


def _expected(pieces: list[Piece], block: Box) -> Iterator[tuple[Box, np.ndarray]]:
    """The parts of a block that something is known of, and what their values must be."""
    for piece in pieces:
        if part := piece.box.overlap(block):
            yield part, piece.source.read(piece.source_box(part)).reshape(part.sizes)


def _compare(stream: _Stream, block: Box, words: np.ndarray, expected: list[tuple[Box, np.ndarray]]) -> None:
    for part, values in expected:
        differs = words[inside(part, block.offsets)] != values
        if count := int(np.count_nonzero(differs)):
            if not stream.different:
                index = np.unravel_index(int(differs.argmax()), differs.shape)
                stream.first = tuple(int(i) + offset for i, offset in zip(index, part.offsets, strict=True))
            stream.different += count
