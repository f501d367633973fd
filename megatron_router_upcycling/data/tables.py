"""Parquet files, and Arrow files of data sets that ``datasets`` has saved: a column of texts, in batches."""

from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.data.documents import Bad, Chunk, Limits
from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.data.streams import blamed, pyarrow
from megatron_router_upcycling.errors import UserError, shown

ROWS = 128  # at a time


def chunks(source: Source, limits: Limits) -> Iterator[Chunk]:
    """The column's texts, some rows at a time; None for null.

    Raises:
        UserError: the file is damaged, has no such column, or a column of something else.
    """
    batches = (_parquet if source.kind == "parquet" else _arrow)(source, limits.text_key)
    first = 1
    while True:
        with blamed(source.path):
            batch, consumed = next(batches, (None, 0))
        if batch is None:
            return
        texts = _texts(batch)
        yield Chunk(source, "row", first, texts, consumed)
        first += len(texts)


def _parquet(source: Source, key: str) -> Iterator[tuple[Any, int]]:
    parquet = pyarrow(source.path, "pyarrow.parquet")
    with parquet.ParquetFile(source.path) as file:
        _check(source, file.schema_arrow, key)
        rows, read, reported = file.metadata.num_rows, 0, 0
        for batch in file.iter_batches(ROWS, columns=[key]):
            read += len(batch)
            consumed = source.size * read // rows - reported
            reported += consumed
            yield batch.column(0), consumed


def _arrow(source: Source, key: str) -> Iterator[tuple[Any, int]]:
    arrow, ipc = pyarrow(source.path), pyarrow(source.path, "pyarrow.ipc")
    with arrow.memory_map(str(source.path)) as file, ipc.open_stream(file) as reader:
        _check(source, reader.schema, key)
        reported = 0
        for batch in reader:
            column, place = batch.column(key), file.tell()
            for start in range(0, len(column), ROWS):
                yield column.slice(start, ROWS), place - reported
                reported = place


def _check(source: Source, schema: Any, key: str) -> None:
    if key not in schema.names:
        columns = ", ".join(map(shown, schema.names[:8]))
        raise UserError(f"SOURCE {source.path}: has no column {key!r}, but {columns}; see --text-key")
    kind = str(schema.field(key).type)
    if "string" not in kind or kind.startswith(("list", "struct", "map", "large_list")):
        raise UserError(f"SOURCE {source.path}: its column {key!r} holds {kind}, not texts; see --text-key")


def _texts(column: Any) -> list[str | Bad | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in column]


def _text(value: Any) -> str | Bad | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 ({error.reason} at byte {error.start + 1})")
