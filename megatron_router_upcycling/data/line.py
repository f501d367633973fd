"""The order of parts: workers end them as it happens, and the writer has them one after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_router_upcycling.data import parts
from megatron_router_upcycling.data.documents import Chunk, Skipped
from megatron_router_upcycling.data.workers import Child
from megatron_router_upcycling.data.writer import Counts
from megatron_router_upcycling.errors import UserError

# Told of each part: bytes of the files, tokens, and whether an earlier run had done it.
Progress = Callable[[int, int, bool], None]


def check_bad(count: int, first: Skipped, allowed: int) -> None:
    """Refuse more bad documents than are allowed.

    Raises:
        UserError: names the first.
    """
    if count > allowed:
        many = f"; {count} documents like this are more than --max-bad {allowed}" if allowed else ""
        hint = "" if allowed else "; mend it, or pass --max-bad N to leave out up to N such documents"
        raise UserError(f"SOURCE {first}{many}{hint}")


class Line:
    """Takes parts as they are done and hands them to the writer in their order."""

    def __init__(
        self,
        work: Path,
        writer: Child,
        progress: Progress,
        max_tokens: int | None,
        max_bytes: int | None,
        max_bad: int,
    ) -> None:
        self._work, self._writer, self._progress = work, writer, progress
        self._max_tokens, self._max_bytes, self._max_bad = max_tokens, max_bytes, max_bad
        self._waiting: dict[int, parts.Summary] = {}
        self._next = self._unanswered = 0
        self.told = parts.Summary()  # of the parts that were handed over

    def wanted(self) -> bool:
        """Whether the text may go on beyond the parts that were handed over."""
        return (self._max_tokens is None or self.told.tokens <= self._max_tokens) and (
            self._max_bytes is None or self.told.bytes <= self._max_bytes
        )

    def tasks(self, all_parts: Iterator[list[Chunk]]) -> Iterator[tuple[int, list[Chunk]]]:
        """The parts that are not done, with their numbers; those that are go to the writer."""
        for number, part in enumerate(all_parts):
            if not self.wanted():
                return
            summary = parts.summary_of(self._work, number)
            if summary is None:
                yield number, part
            else:
                self.done((number, part), summary, before=True)

    def done(self, task: tuple[int, list[Chunk]], summary: parts.Summary, before: bool = False) -> None:
        number, part = task
        self._progress(sum(chunk.consumed for chunk in part), summary.tokens, before)
        self._waiting[number] = summary
        while self._next in self._waiting and self.wanted():
            self._count(self._waiting.pop(self._next))
            self._send(self._next)
            self._next += 1

    def _count(self, summary: parts.Summary) -> None:
        self.told += summary
        if self.told.bad:
            check_bad(self.told.bad, self.told.skipped[0], self._max_bad)

    def _send(self, number: int | None) -> None:
        self._writer.send(number)
        self._unanswered += 1
        while self._unanswered and self._writer.connection.poll():
            self._answer()

    def _answer(self) -> list[Counts]:
        self._unanswered -= 1
        return self._writer.receive()

    def end(self) -> list[Counts]:
        """End the data; what was written of each prefix."""
        self._send(None)
        while self._unanswered:
            counts = self._answer()
        return counts
