"""From files of text to ``PREFIX.bin`` and ``.idx``: in tasks of datatrove's executors, joined in order.

Meanwhile a hidden folder ``.NAME.parts`` beside PREFIX holds what finished tasks have written. A run that was
killed leaves it, and the same command skips them. The same text and options give the same bytes, however many
workers there are and however often the run was killed.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.publish.folder import held
from megatron_router_upcycling.data import executors, parts, publish, readers, sources, tokenizer
from megatron_router_upcycling.data.record import Record
from megatron_router_upcycling.data.writer import Output, Writer
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions, write_whole

FORMAT = 2  # of the parts
Tasks = list[list[readers.Piece]]
# Called after each task: bytes of the files, tokens, and whether an earlier run had done it.
Progress = Callable[[int, int, bool], None]


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
    workers: int | None = None  # at a time: None for one a core, or for Slurm as many as it has room for
    executor: str = "local"
    slurm: dict[str, str] = field(default_factory=dict)  # options of sbatch
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
    def limits(self) -> readers.Limits:
        return readers.Limits(self.options.text_key, self.options.max_document_bytes)

    @property
    def work(self) -> Path:
        return self.output.with_name(f".{self.output.name}.parts")


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
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out {options.held_out}: must be from 0 to below 1, as 0.01")
    positive = ("train_tokenizer", "max_tokens", "max_bytes", "max_document_bytes", "workers")
    for name, least in {**dict.fromkeys(positive, 1), "max_bad": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if place:
        tokenizer.check(place)
    job = Job(*found, output.absolute(), place, options)
    publish.check(job.prefixes, [Path(source.path) for source in job.sources], options.overwrite)
    return job


@dataclass
class Counts:
    """What the parts have said, in the order of the text."""

    empty: int = 0
    bad_count: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)  # the first of them, as the record has them
    tiktoken_differs: int = 0  # parts
    rows: Counter[int] = field(default_factory=Counter)  # of each source

    def add(self, job: Job, task: list[readers.Piece], summary: parts.Summary) -> None:
        """Count a part.

        Raises:
            UserError: now there are more bad documents than are allowed; names the first.
        """
        before, allowed = [], job.options.max_bad
        for piece, rows in zip(task, summary.rows, strict=True):
            before.append(self.rows[piece.source])
            self.rows[piece.source] += rows
        for number, row, why in summary.bad[: parts.LISTED - len(self.bad)]:
            source = job.sources[task[number].source]
            place: dict[str, Any] = {"file": source.path}
            if unit := readers.UNITS.get(source.kind):
                place[unit] = before[number] + row
            self.bad.append({**place, "why": why})
        self.empty += summary.empty
        self.bad_count += summary.bad_count
        self.tiktoken_differs += summary.tiktoken_differs
        if self.bad_count > allowed:
            file, *row_number, (_, why) = self.bad[0].items()
            where = " ".join(map(str, [file[1], *itertools.chain(*row_number)]))
            many = f"; {self.bad_count} documents like this are more than --max-bad {allowed}"
            hint = "; fix it, or pass --max-bad N to leave out up to N such documents"
            raise UserError(f"SOURCE {where}: {why}{many if allowed else hint}")


def run(job: Job, progress: Progress) -> tuple[list[Record], str]:
    """Make the data.

    Returns:
        The records of its prefixes, and why tokens came by tokenizers and not tiktoken, where they did.

    Raises:
        UserError: the text cannot be used, or the disk not be written; nothing is left then.
        KeyboardInterrupt: or its subclass for SIGTERM, with a text that says what was left.
    """
    with publish.parents_of(job.output), held(job.output, "--output"):
        given, slow = _given(job)
        try:
            tasks = readers.tasks(job.sources, job.options.text_key)
            _open(job, given)
            made = given or _trained(job, tasks)
            counts, writer = _make(job, tasks, made, given is not None and not slow, progress)
            writer.close()
            records = [_record(job, made, counts, output) for output in writer.outputs]
            publish.publish(job.work, job.prefixes, records, job.options.train_tokenizer is not None)
        except (KeyboardInterrupt, executors.WorkerLost) as error:
            done = len(list(job.work.glob("*.npz")))
            if isinstance(error, executors.WorkerLost):
                raise
            if not done:
                shutil.rmtree(job.work, ignore_errors=True)
                raise
            left = f"{done} finished parts are in {job.work}; run the same command again to resume"
            raise type(error)(left) from None
        except BaseException as error:
            shutil.rmtree(job.work, ignore_errors=True)
            if isinstance(error, OSError):
                why = error.strerror or error
                raise UserError(f"--output {job.output}: cannot be written ({why}); make room") from None
            raise
        shutil.rmtree(job.work, ignore_errors=True)
    if counts.tiktoken_differs:
        slow = f"in {counts.tiktoken_differs} of {len(tasks)} parts tiktoken gives other tokens"
    return records, slow


def _given(job: Job) -> tuple[tokenizer.Tokenizer | None, str]:
    if job.place is None:
        return None, ""
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; this one answers
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, ignored) as pool:
        loaded, slow = pool.submit(tokenizer.load_apart, job.place).result()
    if job.options.end_of_document and loaded.end_of_document is None:
        raise UserError(f"--tokenizer {job.place}: has no end-of-document token; pass --no-end-of-document")
    return loaded, slow


def _open(job: Job, given: tokenizer.Tokenizer | None) -> None:
    """Make the folder of parts, or keep it where the same text and options have made it."""
    options, work = job.options, job.work
    trained = [options.train_tokenizer, options.max_bytes, tokenizer.TRAINING_LINES]
    decisive = {
        "format": FORMAT,
        "text": sources.state_of(job.sources),
        "limits": asdict(job.limits),
        "held_out": [options.held_out, options.seed],
        "end_of_document": options.end_of_document,
        "tokenizer": [given.sha256, given.vocab_size, given.encode_special_tokens] if given else trained,
        "versions": versions("megatron-router-upcycling", "tokenizers", "tiktoken", "sentencepiece"),
    }
    file, content = work / "options.json", json.dumps(decisive, indent=2)
    if not (file.is_file() and file.read_text(encoding="utf-8") == content):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_whole(file, content)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()


def _trained(job: Job, tasks: Tasks) -> tokenizer.Tokenizer:
    """A tokenizer trained on the documents that are not held out."""
    assert job.options.train_tokenizer
    file = job.work / publish.TOKENIZER
    if not file.is_file():
        partial = file.with_suffix(".partial")
        tokenizer.train(_training_texts(job, tasks), job.options.train_tokenizer, partial)
        partial.rename(file)
    return tokenizer.load(file)


def _training_texts(job: Job, tasks: Tasks) -> Iterator[str]:
    left, counts = job.options.max_bytes, Counts()
    for task in tasks:
        summary = parts.Summary()
        for document in parts.documents(job.sources, task, job.limits, summary):
            if left is not None:
                left -= len(document.text.encode())
                if left < 0:
                    return
            if not parts.is_held_out(document.text, job.options.held_out, job.options.seed):
                yield document.text
        counts.add(job, task, summary)


def _make(
    job: Job, tasks: Tasks, made: tokenizer.Tokenizer, tiktoken: bool, progress: Progress
) -> tuple[Counts, Writer]:
    options, work = job.options, job.work
    end = made.end_of_document if options.end_of_document else None
    how = (options.held_out, options.seed, made.vocab_size, end, made.encode_special_tokens, tiktoken)
    parts.Job(job.sources, tasks, job.limits, *how).save(work, made.definition)
    outputs = tuple(work / "out" / prefix.name for prefix in job.prefixes)
    writer = Writer(outputs, tokenizer.optimal_dtype(made.vocab_size), options.max_tokens, options.max_bytes)
    executor = _executor(job, len(tasks))
    todo = executor.get_incomplete_ranks()
    earlier = set(range(len(tasks))) - set(todo)
    counts, done, rank = Counts(), set(earlier), 0
    with contextlib.closing(executor.finished(todo, lambda: not writer.full)) as finished:
        while rank < len(tasks) and not writer.full:
            if rank not in done:
                done.add(next(finished))
                continue
            tokens, table, summary = parts.load(work, rank, writer.dtype)
            counts.add(job, tasks[rank], summary)
            writer.append(tokens, table)
            progress(sum(piece.size for piece in tasks[rank]), summary.tokens, rank in earlier)
            rank += 1
    for name, output in zip(("training", "held-out data"), writer.outputs, strict=False):
        if not output.documents:
            share = f"--held-out {options.held_out} of " if options.held_out else ""
            raise UserError(
                f"{share}the text that SOURCE, --max-tokens and --max-bytes leave: no document for {name}"
                f" ({counts.empty} are empty); more text, or another share, would do"
            )
    return counts, writer


def _executor(job: Job, tasks: int) -> executors.Local | executors.Slurm:
    options, pipeline, logs = job.options, [parts.Tokenise(job.work)], str(job.work / "tasks")
    if options.executor == "slurm":
        return executors.Slurm(job.work, pipeline, tasks, options.workers, logs, options.slurm)
    workers = options.workers or len(os.sched_getaffinity(0))
    return executors.Local(pipeline, tasks, min(workers, tasks), logs)


def _record(job: Job, made: tokenizer.Tokenizer, counts: Counts, output: Output) -> Record:
    trained = job.options.train_tokenizer is not None
    place = publish.tokenizer_of(job.output) if trained else made.place.absolute()
    options = asdict(job.options) | {"sources": [source.path for source in job.sources[: parts.LISTED]]}
    for name in ("workers", "executor", "slurm", "overwrite"):  # do not change what is written
        options.pop(name)
    return Record(
        documents=output.documents,
        tokens=output.tokens,
        bytes=output.bytes,
        bytes_per_token=round(output.bytes / max(output.tokens, 1), 4),
        longest_document=output.longest_document,
        vocab_size=made.vocab_size,
        tokenizer=str(place),
        tokenizer_sha256=made.sha256,
        dtype=tokenizer.optimal_dtype(made.vocab_size).__name__,
        end_of_document=made.end_of_document if job.options.end_of_document else None,
        empty=counts.empty,
        skipped_count=counts.bad_count,
        skipped=counts.bad,
        left_out=dict(job.left_out.most_common()),
        options=options,
        versions=versions("megatron-router-upcycling", "megatron-core", "tokenizers", "sentencepiece"),
    )
