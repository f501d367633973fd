"""Documents of every kind of file: datatrove's readers, two of our own, and checks of what they give.

datatrove's own reader of JSON lines passes over what it cannot parse, and gives up a file at a byte that is
not UTF-8. Here every row comes out: as a document, or with the reason why it is none.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.readers.ipc import IpcReader
from datatrove.pipeline.readers.warc import WarcReader

from megatron_router_upcycling.data.sources import BYTE_ORDER_MARK, Source, blamed, file_system
from megatron_router_upcycling.errors import UserError, printable, shown

SMALLEST_TASK, LARGEST_TASK = 1 << 22, 1 << 26  # bytes of files
TASKS = 256  # as many as there shall be, between these sizes
FILE_COST = 1 << 10  # what a file counts for beside its bytes: many empty ones make a task too
ROWS = 128  # of a table at a time
UNITS = {"parquet": "row", "arrow": "row", "csv": "row", "warc": "record", "array": "item", "lines": "line"}


@dataclass(frozen=True)
class Piece:
    """A share of a file: bytes ``start`` to ``end`` of lines, row groups of Parquet, or (None) all of it."""

    source: int  # its number
    size: int  # bytes of the file that it stands for
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Limits:
    """What counts as a document."""

    text_key: str
    max_document_bytes: int


class Bad(Exception):
    """Why something is no document."""


def tasks(sources: list[Source], text_key: str) -> list[list[Piece]]:
    """The files in order as tasks of bounded size, which depend on the files alone.

    Raises:
        UserError: a Parquet file cannot be read, or has no texts under ``text_key``.
    """
    size = min(max(sum(source.size for source in sources) // TASKS, SMALLEST_TASK), LARGEST_TASK)
    made: list[list[Piece]] = [[]]
    filled = 0
    for number, source in enumerate(sources):
        for piece in _cut(number, source, size, text_key):
            made[-1].append(piece)
            filled += FILE_COST + piece.size
            if filled >= size:
                made.append([])
                filled = 0
    return [task for task in made if task]


def _cut(number: int, source: Source, size: int, text_key: str) -> Iterator[Piece]:
    if source.kind == "lines" and not source.compressed and source.size > size:
        for start in range(0, source.size, size):
            end = min(start + size, source.size)
            yield Piece(number, end - start, start, end)
    elif source.kind == "parquet":
        with blamed(source.path):
            yield from _cut_table(number, source, size, text_key)
    else:
        yield Piece(number, source.size)


def _cut_table(number: int, source: Source, size: int, text_key: str) -> Iterator[Piece]:
    import pyarrow.parquet

    files, path = file_system(source.path)
    with files.open(path, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        schema, about = table.schema_arrow, table.metadata
        sizes = [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]
    if text_key not in schema.names:
        columns = ", ".join(map(shown, schema.names[:8]))
        raise UserError(f"SOURCE {source.path}: has no column {text_key!r}, but {columns}; see --text-key")
    if (kind := str(schema.field(text_key).type)) not in ("string", "large_string", "string_view"):
        raise UserError(
            f"SOURCE {source.path}: its column {text_key!r} holds {kind}, not texts; see --text-key"
        )
    start = filled = 0
    for end, group_size in enumerate(sizes, 1):
        filled += group_size
        if filled >= size or end == len(sizes):
            share = source.size * end // len(sizes) - source.size * start // len(sizes)
            yield Piece(number, share, start, end)
            start, filled = end, 0


def read(source: Source, piece: Piece, limits: Limits) -> Iterator[Document]:
    """The documents of a piece in order; ``row`` in their metadata counts from 1 within the piece.

    A document has a text; or none, and ``bad`` in its metadata if it is no empty one.

    Raises:
        UserError: the file cannot be read, is cut short or damaged.
    """
    files, path = file_system(source.path)
    folder, _, name = path.rpartition("/")
    with blamed(source.path):
        reader = READERS[source.kind](DataFolder(folder or "/", fs=files), text_key=limits.text_key)
        reader.piece, reader.longest = piece, limits.max_document_bytes
        yield from reader.read_file(name)


class _Checked(BaseDiskReader):
    """Gives a document for every row, whatever is in it."""

    piece: Piece
    longest: int

    def get_document_from_dict(self, data: Any, source_file: str, id_in_file: int) -> Document:
        metadata: dict[str, Any] = {"row": id_in_file + 1}
        text = ""
        try:
            text = self.check(self.text_of(data))
        except Bad as bad:
            metadata["bad"] = str(bad)
        return Document(text=text, id="", metadata=metadata)

    def check_size(self, size: int) -> None:
        if size > self.longest:
            raise Bad(
                f"is longer than {self.longest:,} bytes; cut it into documents, or raise --max-document-bytes"
            )

    def check(self, text: str) -> str:
        try:
            self.check_size(len(text) if text.isascii() else len(text.encode()))
        except UnicodeEncodeError as error:
            surrogate = printable(text[error.start])
            raise Bad(f"has a lone surrogate ({surrogate}), which is half a character") from None
        return text

    def text_of(self, data: Any) -> str:
        """The text in a row, or in a value of JSON."""
        key = self.text_key
        if not isinstance(data, dict):
            raise Bad(f"is no JSON object with a {key!r} entry, but {_named(data)}")
        if key not in data:
            there = ", ".join(map(shown, list(data)[:8])) or "nothing"
            raise Bad(f"has no {key!r}, but {there}; see --text-key")
        if not isinstance(data[key], str):
            raise Bad(f"its {key!r} is {_named(data[key])}, not a text")
        return data[key]


def _named(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is {content[error.start]:#04x}"
        raise Bad(f"is not UTF-8: {where}; convert it, as with iconv -t UTF-8") from None


class _Lines(_Checked):
    """Lines of JSON, of a range of bytes: those that begin in it."""

    name = "Lines"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression="infer") as file:
            place = start = self.piece.start
            if start:
                file.seek(start - 1)
                place += self._pass(file) - 1
            number = 0
            while (self.piece.end is None or place < self.piece.end) and (
                line := file.readline(self.longest + 2)
            ):
                content = line if place else line.removeprefix(BYTE_ORDER_MARK)
                place += len(line)
                if len(line) > self.longest + 1 and not line.endswith(b"\n"):
                    place += self._pass(file)
                yield self.get_document_from_dict(content, "", number)
                number += 1

    def _pass(self, file: Any) -> int:
        """Read to the end of a line; the bytes that it took."""
        taken = 0
        while line := file.readline(1 << 20):
            taken += len(line)
            if line.endswith(b"\n"):
                break
        return taken

    def text_of(self, data: Any) -> str:
        self.check_size(len(data.removesuffix(b"\n")))
        line = _decoded(data.strip())
        return super().text_of(_value(line)) if line else ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Bad(f"is no JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError):
        raise Bad("is no JSON that can be read: nested too deep, or a number too long") from None


class _Array(_Checked):
    """One array of objects, which is held in memory."""

    name = "JSON"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression="infer") as file:
            values = json.loads(file.read().removeprefix(BYTE_ORDER_MARK))
        for number, value in enumerate(values):
            yield self.get_document_from_dict(value, "", number)


class _File(_Checked):
    """A file that is one document."""

    name = "Text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb", compression="infer") as file:
            yield self.get_document_from_dict(file.read(self.longest + 1), "", 0)

    def text_of(self, data: Any) -> str:
        self.check_size(len(data))
        text = _decoded(data.removeprefix(BYTE_ORDER_MARK))
        if "\0" in text:
            raise Bad(f"is binary: byte {data.index(0) + 1} is zero")
        return text


class _Parquet(_Checked):
    """One column of some row groups, in batches."""

    name = "Parquet"

    def read_file(self, filepath: str) -> Iterator[Document]:
        import pyarrow.parquet

        number = 0
        groups = range(self.piece.start, self.piece.end or 0)
        with self.data_folder.open(filepath, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS, groups, [self.text_key]):
                for row in batch.to_pylist():
                    yield self.get_document_from_dict(row, "", number)
                    number += 1


class _Csv(_Checked):
    """Rows under a line of names. datatrove's reader would take the line ends out of texts."""

    name = "CSV"

    def read_file(self, filepath: str) -> Iterator[Document]:
        csv.field_size_limit(max(self.longest, csv.field_size_limit()))
        how = {"encoding": "utf-8-sig", "newline": "", "compression": "infer"}
        with self.data_folder.open(filepath, "r", **how) as file:
            for number, row in enumerate(csv.DictReader(file)):
                yield self.get_document_from_dict(row, "", number)


class _Arrow(_Checked, IpcReader):
    def _iter_stream_batches(self, filepath: str) -> Iterator[Any]:
        for batch in super()._iter_stream_batches(filepath):
            yield batch.select([self.text_key]) if self.text_key in batch.schema.names else batch


class _Warc(_Checked, WarcReader):
    """Pages of a crawl as HTML (.warc) or as text (.wet)."""

    def text_of(self, data: Any) -> str:
        return data["text"]


READERS: dict[str, Callable[..., _Checked]] = {
    "lines": _Lines,
    "array": _Array,
    "parquet": _Parquet,
    "csv": _Csv,
    "arrow": partial(_Arrow, stream=True),
    "warc": _Warc,
    "text": _File,
}
