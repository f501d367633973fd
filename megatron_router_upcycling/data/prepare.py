"""From files of text to ``PREFIX.bin`` and ``.idx``: in parts, by worker processes, put together in order.

While it is made, a hidden folder ``.NAME.parts`` beside PREFIX holds the parts that are done. A run that was
stopped or killed leaves it, and the same command goes on from there. The same text and options give the same
bytes, however many workers there are and however often the run was stopped.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_router_upcycling.checkpoint.publish import lock
from megatron_router_upcycling.data import chunks, parts, publish, sources, tokenizer, writer
from megatron_router_upcycling.data.documents import Limits, Skipped, read
from megatron_router_upcycling.data.line import Line, Progress, check_bad
from megatron_router_upcycling.data.record import Record
from megatron_router_upcycling.data.workers import Child, WorkerLost, spread
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions, write_whole

FORMAT = 1  # of the parts


@dataclass(frozen=True)
class Options:
    """What decides the data, besides the text itself; and how it is made."""

    text_key: str = "text"
    train_tokenizer: int | None = None
    held_out: float = 0.0
    seed: int = 0
    end_of_document: bool = True
    max_tokens: int | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 1 << 24
    max_bad: int = 0
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """All that is known before any text is read."""

    sources: list[sources.Source]
    left_out: Counter[str]
    output: Path
    place: Path | None  # of the tokenizer; None where one is to be trained
    options: Options

    @property
    def bytes_to_read(self) -> int:
        return sum(source.size for source in self.sources)

    @property
    def prefixes(self) -> tuple[Path, ...]:
        """Of training and, where some are held out, of held-out documents."""
        held_out = self.output.with_name(self.output.name + "_held_out")
        return (self.output, held_out) if self.options.held_out else (self.output,)

    @property
    def limits(self) -> Limits:
        return Limits(self.options.text_key, self.options.max_document_bytes)

    @property
    def part_bytes(self) -> int:
        return chunks.part_bytes(self.sources)


def prepare(
    found: tuple[list[sources.Source], Counter[str]], output: Path, place: Path | None, options: Options
) -> Job:
    """Check everything that can be checked without reading the text.

    Args:
        found: what ``sources.find`` has found.
        place: the tokenizer, or None for one that is trained.

    Raises:
        UserError: something is wrong with the options, the tokenizer or the place of the output.
    """
    _check(options)
    if place:
        tokenizer.check(place)
    job = Job(*found, output.absolute(), place, options)
    publish.check(job.prefixes, [source.path for source in job.sources], options.overwrite)
    return job


def _check(options: Options) -> None:
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out {options.held_out}: must be from 0 to below 1, as 0.01")
    least = {
        "train_tokenizer": 1,
        "max_tokens": 1,
        "max_bytes": 1,
        "max_document_bytes": 1,
        "max_bad": 0,
        "workers": 1,
    }
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")


def run(job: Job, progress: Progress) -> list[Record]:
    """Make the data; return the records of its prefixes.

    Raises:
        UserError: the text cannot be used, or the disk not be written; nothing is left then.
        KeyboardInterrupt: or its subclass for SIGTERM, with a text that says what was left.
    """
    work = job.output.with_name(f".{job.output.name}.parts")
    outputs = tuple(work / "out" / prefix.name for prefix in job.prefixes)
    write = writer.Job(work, outputs, job.options.max_tokens, job.options.max_bytes)
    with publish.parents_of(job.output), lock.held(job.output, "--output"), Child(write) as end:
        given = _given(job)
        try:
            _open(work, job, given)
            made = given or _trained(job, work)
            counts, told = _make(job, made, work, progress, end)
            _check_counts(job, counts)
            records = [_record(job, made, told, count) for count in counts]
            publish.publish(work, job.prefixes, records, job.options.train_tokenizer is not None)
        except (KeyboardInterrupt, WorkerLost) as error:
            done = len(list(work.glob("*.part")))
            if not done:
                shutil.rmtree(work, ignore_errors=True)
                raise
            if isinstance(error, WorkerLost):
                raise
            raise type(error)(f"{done} parts are in {work}; the same command goes on from there") from None
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise UserError(f"--output {job.output}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return records


def _given(job: Job) -> tokenizer.Tokenizer | None:
    if job.place is None:
        return None
    with Child(tokenizer.Loader()) as loader:
        loader.send(job.place)
        loaded: tokenizer.Tokenizer = loader.receive()
    if job.options.end_of_document and loaded.end_of_document is None:
        raise UserError(f"--tokenizer {job.place}: has no end-of-document token; pass --no-end-of-document")
    return loaded


def _open(work: Path, job: Job, given: tokenizer.Tokenizer | None) -> None:
    """Make the folder of parts, or keep it where the same text and options have made it."""
    options = job.options
    decisive = {
        "format": FORMAT,
        "text": sources.state_of(job.sources),
        "part_bytes": job.part_bytes,
        "limits": asdict(job.limits),
        "held_out": [options.held_out, options.seed],
        "end_of_document": options.end_of_document,
        "tokenizer": [options.train_tokenizer, options.max_bytes, tokenizer.TRAINING_LINES]
        if given is None
        else [
            hashlib.sha256(_bytes(given.definition)).hexdigest(),
            given.vocab_size,
            given.encode_special_tokens,
        ],
        "versions": versions("megatron-router-upcycling", "tokenizers", "sentencepiece"),
    }
    file, content = work / "options.json", json.dumps(decisive, indent=2)
    if not (file.is_file() and file.read_text(encoding="utf-8") == content):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_whole(file, content)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()


def _bytes(definition: str | bytes) -> bytes:
    return definition if isinstance(definition, bytes) else definition.encode()


def _trained(job: Job, work: Path) -> tokenizer.Tokenizer:
    """A tokenizer trained on the documents that are not held out."""
    assert job.options.train_tokenizer
    file = work / publish.TOKENIZER
    if not file.is_file():
        partial = file.with_suffix(".partial")
        tokenizer.train(_training_texts(job), job.options.train_tokenizer, partial)
        partial.rename(file)
    return tokenizer.load(file)


def _training_texts(job: Job) -> Iterator[str]:
    bad, left = 0, job.options.max_bytes
    for part in chunks.parts(job.sources, job.limits, job.part_bytes):
        for chunk in part:
            for found in read(chunk, job.limits):
                if isinstance(found, Skipped):
                    bad += 1
                    check_bad(bad, found, job.options.max_bad)
                    continue
                text, size = found
                if left is not None:
                    left -= size
                    if left < 0:
                        return
                if not parts.is_held_out(text, job.options.held_out, job.options.seed):
                    yield text


def _make(
    job: Job, made: tokenizer.Tokenizer, work: Path, progress: Progress, end: Child
) -> tuple[list[writer.Counts], parts.Summary]:
    options = job.options
    token = made.end_of_document if options.end_of_document else None
    make = parts.Job(made, job.limits, options.held_out, options.seed, token, work)
    line = Line(work, end, progress, options.max_tokens, options.max_bytes, options.max_bad)
    with contextlib.ExitStack() as stack:
        started = [Child(make) for _ in range(options.workers)]
        children = [stack.enter_context(child) for child in started]
        todo = line.tasks(chunks.parts(job.sources, job.limits, job.part_bytes))
        for task, summary in spread(children, todo, line.wanted):
            line.done(task, summary)
    if not line.told.documents:
        empty = line.told.empty
        raise UserError(f"SOURCE: no document was found in {len(job.sources)} files ({empty} are empty)")
    return line.end(), line.told


def _check_counts(job: Job, counts: list[writer.Counts]) -> None:
    for name, count in zip(("training", "held-out data"), counts, strict=False):
        if not count.documents:
            share = f"--held-out {job.options.held_out} of " if job.options.held_out else ""
            raise UserError(
                f"{share}the text that SOURCE, --max-tokens and --max-bytes leave: no document for {name};"
                " more text, or another share, would do"
            )


def _record(job: Job, made: tokenizer.Tokenizer, told: parts.Summary, counts: writer.Counts) -> Record:
    trained = job.options.train_tokenizer is not None
    place = publish.tokenizer_of(job.output) if trained else made.place.absolute()
    options = asdict(job.options) | {"sources": [str(source.path) for source in job.sources[: parts.LISTED]]}
    for name in ("workers", "overwrite"):  # do not change what is written
        options.pop(name)
    return Record(
        **vars(counts),
        bytes_per_token=round(counts.bytes / max(counts.tokens, 1), 4),
        vocab_size=made.vocab_size,
        tokenizer=str(place),
        tokenizer_sha256=made.sha256,
        dtype=tokenizer.optimal_dtype(made.vocab_size).__name__,
        end_of_document=made.end_of_document if job.options.end_of_document else None,
        empty=told.empty,
        skipped_count=told.bad,
        skipped=[bad.entries() for bad in told.skipped],
        left_out=dict(job.left_out.most_common()),
        options=options,
        versions=versions("megatron-router-upcycling", "megatron-core", "tokenizers", "sentencepiece"),
    )
