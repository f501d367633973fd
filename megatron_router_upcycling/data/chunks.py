"""Files cut into chunks, and chunks gathered into parts of bounded size.

Where a part ends depends on the files and its size alone, so that any number of workers, and a run that goes
on from finished parts, have the same parts. One process reads and cuts; parsing is left to the workers.
"""

from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.data import json_array, tables
from megatron_router_upcycling.data.documents import Bad, Chunk, Limits, too_long
from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.data.streams import Stream

SMALLEST_PART, LARGEST_PART = 1 << 19, 1 << 26  # bytes of text
PARTS = 256  # as many as there shall be, between these sizes
FILE_COST = 1 << 10  # what a file counts for beside its bytes: many empty ones make a part too
BLOCK = 1 << 20  # bytes that are read at a time where a line is passed over


def part_bytes(sources: list[Source]) -> int:
    """The size that suits so much text."""
    return min(max(sum(source.size for source in sources) // PARTS, SMALLEST_PART), LARGEST_PART)


def parts(sources: list[Source], limits: Limits, size: int) -> Iterator[list[Chunk]]:
    """All chunks in order, as many together as reach ``size`` bytes of text.

    Raises:
        UserError: a file cannot be read, or is not what its name says.
    """
    part: list[Chunk] = []
    filled = 0
    for source in sources:
        for chunk in _chunks(source, limits, size):
            part.append(chunk)
            filled += FILE_COST + _text_bytes(chunk)
            if filled >= size:
                yield part
                part, filled = [], 0
    if part:
        yield part


def _text_bytes(chunk: Chunk) -> int:
    if chunk.source.kind == "text":
        return chunk.source.size
    if isinstance(chunk.content, bytes):
        return len(chunk.content)
    return sum(len(text) for text in chunk.content if isinstance(text, str))


def _chunks(source: Source, limits: Limits, size: int) -> Iterator[Chunk]:
    if source.kind == "text":
        return iter([Chunk(source, "line", None, b"", source.size)])
    if source.kind in ("parquet", "arrow"):
        return tables.chunks(source, limits)
    if source.kind == "json" and json_array.begins(source):
        return json_array.chunks(source, limits)
    return _lines(source, limits, size)


def _lines(source: Source, limits: Limits, size: int) -> Iterator[Chunk]:
    """Whole lines, about ``size`` bytes at a time; a line that is too long is passed over."""
    number = 1

    def chunk(content: bytes | list[Any]) -> Chunk:
        nonlocal number
        first = number
        number += content.count(b"\n") + 1 if isinstance(content, bytes) else len(content)
        return Chunk(source, "line", first, content, stream.advance())

    with Stream(source) as stream:
        block = stream.first(size)
        while block:
            end = block.rfind(b"\n") + 1
            if end:
                yield chunk(block[: end - 1])
            rest = block[end:]
            if len(rest) > limits.max_document_bytes:
                yield chunk([Bad(too_long(limits.max_document_bytes))])
                rest = _after_line(stream)
            more = stream.read(size)
            if rest and not more:
                yield chunk(rest.removesuffix(b"\n"))
                rest = b""
            block = rest + more


def _after_line(stream: Stream) -> bytes:
    """Read to the end of a line; return what was read beyond it."""
    while block := stream.read(BLOCK):
        end = block.find(b"\n")
        if end >= 0:
            return block[end + 1 :]
    return b""
