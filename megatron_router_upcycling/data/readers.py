"""Cut the files into tasks, and read each row of a file as a text or as the reason why it has none.

datatrove's reader of JSON lines skips what it cannot parse, and drops the rest of a file at invalid UTF-8.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling.data.record import Options
from megatron_router_upcycling.data.sources import COMPRESSED, Source, blamed, file_system
from megatron_router_upcycling.errors import reason

SMALLEST_TASK, LARGEST_TASK = 1 << 22, 1 << 26  # bytes of files
TASKS = 256  # target number of tasks, within these sizes
FILE_COST = 1 << 10  # bytes added for each file, so that many empty files also fill a task
ROWS = 128  # read from a table at a time
UNITS = {"lines": "line", "text": ""}  # the unit in which positions in a file are given, if not rows


@dataclass(frozen=True)
class Piece:
    """The lines, or Parquet row groups, that begin in a byte range of a file. Other kinds are not split."""

    source: Source
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes of the file in this piece."""
        return min(self.end, self.source.size) - self.start


Task = list[Piece]


def tasks(sources: list[Source]) -> list[Task]:
    """Cut the files, in order, into tasks of bounded size. The result depends on the files alone."""
    size = min(max(sum(source.size for source in sources) // TASKS, SMALLEST_TASK), LARGEST_TASK)
    made: list[Task] = [[]]
    filled = 0
    for source in sources:
        whole = source.kind not in ("lines", "parquet") or source.path.lower().endswith(COMPRESSED)
        step = sys.maxsize if whole else size
        for start in range(0, max(source.size, 1), step):
            if filled >= size:
                made.append([])
                filled = 0
            end = start + step if start + step < source.size else sys.maxsize
            made[-1].append(Piece(source, start, end))
            filled += FILE_COST + made[-1][-1].size
    return made


def read(piece: Piece, options: Options) -> Iterator[tuple[str, str]]:
    """For each row (text, reason why it is bad): one of them is "", or both for an empty row."""
    kind, (files, path) = piece.source.kind, file_system(piece.source.path)
    with blamed(piece.source.path), files.open(path, "rb", compression="infer") as stored:
        for row in READERS[kind](io.BufferedReader(stored, 1 << 18), piece, options):
            try:
                text, why = _text_of(row, kind, options), ""
            except (ValueError, RecursionError) as error:
                text, why = "", reason(error)
            yield text, why


def size_of(text: str) -> int:
    """Bytes in UTF-8. Raises ValueError for a lone surrogate, which has no encoding."""
    return len(text) if text.isascii() else len(text.encode())


def _text_of(row: Any, kind: str, options: Options) -> str:
    """The text of a row: the bytes of a line or file, a page, or an object with a text key. Raises ValueError
    or RecursionError with the reason if there is none."""
    key, longest = options.text_key, options.max_document_bytes
    too_long = f"is longer than {longest:,} bytes; cut it into documents, or raise --max-document-bytes"
    if isinstance(row, bytes):
        if len(row.removesuffix(b"\n")) > longest:
            raise ValueError(too_long)
        row = row.decode("utf-8-sig")
        if kind != "text":
            row = json.loads(line) if (line := row.strip()) else {key: ""}
        elif "\0" in row:
            raise ValueError("is binary: it has a byte that is zero")
    if kind not in ("text", "warc"):
        row = row.get(key) if isinstance(row, dict) else None
    if not isinstance(row, str):
        raise ValueError(f"has no text {key!r}; see --text-key")
    if size_of(row) > longest:
        raise ValueError(too_long)
    return row


def _lines(file: Any, piece: Piece, options: Options) -> Iterator[bytes]:
    """Lines with their line ends; of a line that is too long, only the beginning."""
    place = max(piece.start - 1, 0)
    if place:
        file.seek(place)
    begun_before = piece.start > 0  # the first line, or its line end, belongs to the piece before
    while place < piece.end and (line := file.readline(options.max_document_bytes + 2)):
        place += len(line)
        part = line
        while part and not part.endswith(b"\n"):
            part = file.readline(1 << 20)
            place += len(part)
        if not begun_before:
            yield line
        begun_before = False


def _json(file: Any, piece: Piece, options: Options) -> Iterable[Any]:
    """Lines, or the items of one array, which is held in memory."""
    if file.peek()[:1024].decode("utf-8-sig", "ignore").lstrip().startswith("["):
        return json.load(file)
    return _lines(file, piece, options)


def _parquet(file: Any, piece: Piece, options: Options) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        places = [table.metadata.row_group(n).column(0).data_page_offset for n in range(table.num_row_groups)]
        groups = [n for n, place in enumerate(places) if piece.start <= place < piece.end]
        for batch in table.iter_batches(ROWS, groups, [options.text_key]):
            yield from batch.to_pylist()


def _csv(file: Any, piece: Piece, options: Options) -> Iterable[Any]:
    """Rows after a header line. datatrove's reader would remove line ends from texts."""
    csv.field_size_limit(max(options.max_document_bytes, csv.field_size_limit()))
    return csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))


def _arrow(file: Any, piece: Piece, options: Options) -> Iterator[Any]:
    import pyarrow

    for batch in pyarrow.ipc.open_stream(file):
        there = [name for name in batch.schema.names if name == options.text_key]
        yield from (batch.select(there) if there else batch).to_pylist()


def _warc(file: Any, piece: Piece, options: Options) -> Iterator[str]:
    """Pages of a crawl as HTML (.warc) or as text (.wet)."""
    from datatrove.pipeline.readers.warc import process_record
    from warcio.archiveiterator import ArchiveIterator

    yield from (page["text"] for page in map(process_record, ArchiveIterator(file)) if page)


# Kind -> function from an open file to its rows.
READERS: dict[str, Callable[[Any, Piece, Options], Iterable[Any]]] = {
    "lines": _lines,
    "json": _json,
    "parquet": _parquet,
    "csv": _csv,
    "arrow": _arrow,
    "warc": _warc,
    "text": lambda file, _, options: [file.read(options.max_document_bytes + 2)],
}
