"""Documents and what is no document: text taken out of lines, values and files, checked and never coerced."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.data.streams import BYTE_ORDER_MARK, UTF_16, UTF_16_MARKS, Stream
from megatron_router_upcycling.errors import UserError, printable, shown

UNREADABLE = "is no JSON that can be read: nested too deep, or a number too long"


class Bad(Exception):
    """Why something is no document."""


@dataclass(frozen=True)
class Skipped:
    """A bad document: its file, its number there (from 1; None where the file is one document) and why."""

    file: str
    unit: str  # of the number: line, item (of an array) or row (of a table)
    number: int | None
    why: str

    def __str__(self) -> str:
        place = self.file if self.number is None else f"{self.file} {self.unit} {self.number}"
        return f"{place}: {self.why}"

    def entries(self) -> dict[str, Any]:
        """As the record has it."""
        number = {} if self.number is None else {self.unit: self.number}
        return {"file": self.file, **number, "why": self.why}


@dataclass(frozen=True)
class Chunk:
    """A piece of a file as it goes to a worker: lines of JSON, texts, or a file of text, not read yet."""

    source: Source
    unit: str
    first: int | None  # number of the first line, row or item
    content: bytes | list[Any]  # lines; or texts, None for null, and Bad
    consumed: int  # bytes of the file on the disk


@dataclass(frozen=True)
class Limits:
    """What of a chunk counts as a document."""

    text_key: str
    max_document_bytes: int

    def check(self, size: int) -> None:
        if size > self.max_document_bytes:
            raise Bad(too_long(self.max_document_bytes))


def too_long(longest: int) -> str:
    return f"is longer than {longest:,} bytes; cut it into documents, or raise --max-document-bytes"


def read(chunk: Chunk, limits: Limits) -> Iterator[tuple[str, int] | Skipped]:
    """The documents of a chunk in order: texts with their sizes in UTF-8, empty ones too; and what is bad."""
    if chunk.source.kind == "text":
        values: Iterator[Any] = iter([b""])
    elif isinstance(chunk.content, bytes):
        values = iter(chunk.content.split(b"\n"))
    else:
        values = iter(chunk.content)
    number = chunk.first
    for value in values:
        try:
            yield _text(chunk, value, limits)
        except Bad as bad:
            yield Skipped(str(chunk.source.path), chunk.unit, number, str(bad))
        number = None if number is None else number + 1


def _text(chunk: Chunk, value: Any, limits: Limits) -> tuple[str, int]:
    if isinstance(value, Bad):
        raise value
    if chunk.source.kind == "text":
        text = _decode(_whole_file(chunk.source, limits))
    elif isinstance(value, bytes):
        limits.check(len(value))
        text = _of_line(value, limits.text_key)
    else:
        text = as_text(value, limits.text_key)
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        surrogate = printable(text[error.start])
        raise Bad(f"has a lone surrogate ({surrogate}), which is half a character") from None
    limits.check(size)
    return text, size


def _whole_file(source: Source, limits: Limits) -> bytes:
    limits.check(0 if source.compression else source.size)
    try:
        with Stream(source) as stream:
            content = stream.read(limits.max_document_bytes + 1)
    except UserError as error:
        raise Bad(str(error).split(": ", 1)[1]) from None
    limits.check(len(content))
    if content.startswith(UTF_16_MARKS):
        raise Bad(UTF_16)
    if b"\0" in content:
        raise Bad(f"is binary: byte {content.index(0) + 1} is zero")
    return content.removeprefix(BYTE_ORDER_MARK)


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Bad(f"is not UTF-8: byte {error.start + 1} is {content[error.start]:#04x}") from None


def _of_line(line: bytes, key: str) -> str:
    text = _decode(line.strip())
    if not text:
        return ""
    if "\0" in text:
        raise Bad("is no JSON: it has a zero byte, as UTF-16 and binary files do")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Bad(f"is no JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError):
        raise Bad(UNREADABLE) from None
    return of_object(value, key)


def of_object(value: Any, key: str) -> str:
    """The text in a value of JSON.

    Raises:
        Bad: it is no object, or has no text under ``key``.
    """
    if not isinstance(value, dict):
        raise Bad(f"is no JSON object with a {key!r} entry, but {_kind(value)}")
    if key not in value:
        raise Bad(
            f"has no {key!r}, but {', '.join(map(shown, list(value)[:8])) or 'nothing'}; see --text-key"
        )
    return as_text(value[key], key)


def as_text(value: Any, key: str) -> str:
    """``value``, which must be a text.

    Raises:
        Bad: it is null, a number or the like.
    """
    if not isinstance(value, str):
        raise Bad(f"its {key!r} is {_kind(value)}, not a text")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
