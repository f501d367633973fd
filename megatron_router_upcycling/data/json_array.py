"""A file that is one array of JSON objects, read value by value."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.data.documents import UNREADABLE, Bad, Chunk, Limits, of_object, too_long
from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.data.streams import Stream
from megatron_router_upcycling.errors import UserError

BLOCK = 1 << 20  # bytes that are read, and characters of text that are handed on, at a time
WHITE_SPACE = " \t\r\n"


def begins(source: Source) -> bool:
    """Whether the file begins as an array does; otherwise it holds lines, as many .json files do."""
    with Stream(source) as stream:
        return stream.first(BLOCK).lstrip().startswith(b"[")


def chunks(source: Source, limits: Limits) -> Iterator[Chunk]:
    """The texts of the array, some at a time; an object without one is bad by itself.

    Raises:
        UserError: what is there is no array of JSON; the message names the item.
    """
    first, texts, characters = 1, [], 0
    with Stream(source) as stream:
        try:
            for value in _values(stream, limits):
                texts.append(_text_or_bad(value, limits.text_key))
                characters += len(texts[-1]) if isinstance(texts[-1], str) else 0
                if characters >= BLOCK:
                    yield Chunk(source, "item", first, texts, stream.advance())
                    first, texts, characters = first + len(texts), [], 0
        except Bad as bad:
            where = f"item {first + len(texts)} of its array"
            raise UserError(f"SOURCE {source.path}: {where} {bad}") from None
        if texts:
            yield Chunk(source, "item", first, texts, stream.advance())


def _text_or_bad(value: Any, key: str) -> str | Bad:
    try:
        return of_object(value, key)
    except Bad as bad:
        return bad


def _values(stream: Stream, limits: Limits) -> Iterator[Any]:
    text = _Characters(stream)
    text.next()  # the bracket
    after = text.next() if text.peek() == "]" else ","
    while after == ",":
        yield text.value(limits.max_document_bytes)
        after = text.next()
    if after != "]":
        raise Bad("is missing: the file ends before the array does" if not after else "comes without a comma")
    if text.peek():
        raise Bad("is beyond the array's end")


class _Characters:
    """The characters of a stream, as many in memory as are needed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._add(stream.first(BLOCK))

    def _more(self) -> bool:
        """Read on; False at the end. As much again as is left: a long value is not begun too often."""
        if not self._ended:
            self._add(self._stream.read(max(BLOCK, len(self._text) - self._at)))
            return True
        return False

    def _add(self, block: bytes) -> None:
        self._ended = not block
        try:
            self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise Bad(f"or one soon after is not UTF-8 ({error.reason})") from None
        self._at = 0

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in WHITE_SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def next(self) -> str:
        """That character, passed."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self, longest: int) -> Any:
        """The value of JSON that comes next.

        Raises:
            Bad: there is none, or it is longer than ``longest``.
        """
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                complete = end < len(self._text)  # where it ends with what was read, a number may go on
                why = ""
            except json.JSONDecodeError as error:
                complete, why = False, f"is no JSON: {error.msg}"
            except (ValueError, RecursionError):
                raise Bad(UNREADABLE) from None
            if not complete and why and len(self._text) - self._at > longest:
                raise Bad(f"{why}; or it {too_long(longest)}")
            if complete or not self._more():
                if why:
                    raise Bad(why)
                self._at = end
                return value
