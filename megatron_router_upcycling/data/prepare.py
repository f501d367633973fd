"""From files of text to ``PREFIX.bin`` and ``.idx``: in tasks of datatrove's executors, joined in order.

Meanwhile a hidden folder ``.NAME.parts`` beside PREFIX holds what finished tasks have written. A run that was
killed leaves it, and the same command skips them. The same text and options give the same bytes, however many
workers there are and however often the run was killed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.publish.folder import held
from megatron_router_upcycling.data import encoders, executors, parts, publish, readers, tokenizer
from megatron_router_upcycling.data.record import Options, Record
from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions, write_whole

FORMAT = 3  # of the parts
Progress = Callable[[int], None]  # called after each task with the bytes of its files


def run(
    sources: list[Source], left_out: Counter[str], options: Options, progress: Progress
) -> tuple[list[Record], str]:
    """Make the data. A failure leaves nothing, but a run that was stopped, or lost a worker, its parts.

    Returns the records of the prefixes, and why tokens came by tokenizers and not tiktoken, where they did.
    """
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out {options.held_out}: must be from 0 to below 1, as 0.01")
    publish.check(options, [Path(source.path) for source in sources])
    output, work, keep = options.output, options.work, False
    with held(output, "--output", "make room"):
        try:
            return _make(sources, left_out, options, progress)
        except (KeyboardInterrupt, executors.WorkerLost) as error:
            keep = True
            left = f"{len(list(work.glob('*.npz')))} finished parts are in {work}"
            again = f"{error} {left}; run the same command again to resume"
            raise type(error)(again.strip()) from None
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)


def _make(
    sources: list[Source], left_out: Counter[str], options: Options, progress: Progress
) -> tuple[list[Record], str]:
    given = tokenizer.load(options.tokenizer) if options.tokenizer else None
    tasks = readers.tasks(sources)
    _open(sources, options, given)
    made = given or tokenizer.load(_trained(options, tasks))
    if options.end_of_document and made.end_of_document is None:
        raise UserError(f"--tokenizer {made.place}: has no end-of-document token; pass --no-end-of-document")
    slow = ""
    try:
        made.encoder(tiktoken=True)
    except encoders.Unsuited as why:
        slow = str(why)
    prefixes = [options.work / "out" / prefix.name for prefix in options.prefixes]
    outputs = [publish.Output(prefix, made.dtype, n > 0) for n, prefix in enumerate(prefixes)]
    counts = _join(parts.Tokenise(tasks, options, made, not slow), outputs, progress)
    common: dict[str, Any] = {
        "vocab_size": made.vocab_size,
        "tokenizer": str(made.place.absolute() if given else options.trained_tokenizer),
        "tokenizer_sha256": made.sha256,
        "end_of_document": made.end_of_document if options.end_of_document else None,
        "empty": counts.empty,
        "skipped_count": counts.bad_count,
        "skipped": counts.bad,
        "left_out": dict(left_out.most_common()),
        "options": options.decisive() | {"sources": [source.path for source in sources[: parts.LISTED]]},
        "versions": versions("megatron-router-upcycling", "megatron-core", "tokenizers", "sentencepiece"),
    }
    records = []
    for output in outputs:
        if not output.documents:
            side = "held-out data" if output.held_out else "training"
            raise UserError(
                f"SOURCE, --held-out, --max-tokens and --max-bytes leave no document for {side}"
                f" ({counts.empty} are empty); more text, or another share, would do"
            )
        output.write_index()
        own = {name: getattr(output, name) for name in ("documents", "tokens", "bytes", "longest_document")}
        ratio = round(output.bytes / max(output.tokens, 1), 4)
        records.append(Record(dtype=output.dtype.name, bytes_per_token=ratio, **own, **common))
    publish.publish(options, outputs, records)
    if counts.tiktoken_differs:
        slow = f"in {counts.tiktoken_differs} of {len(tasks)} parts tiktoken gives other tokens"
    return records, slow


def _open(sources: list[Source], options: Options, given: tokenizer.Tokenizer | None) -> None:
    """Make the folder of parts, or keep it where the same text and options have made it."""
    work = options.work
    decisive = {
        "format": FORMAT,
        "text": hashlib.sha256(repr(sources).encode()).hexdigest(),
        "options": options.decisive(),
        "tokenizer": given and [given.sha256, given.vocab_size, given.encode_special_tokens],
        "versions": versions("megatron-router-upcycling", "tokenizers", "tiktoken", "sentencepiece"),
    }
    file, content = work / "options.json", json.dumps(decisive, indent=2)
    if not (file.is_file() and file.read_text(encoding="utf-8") == content):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_whole(file, content)
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()


def _trained(options: Options, tasks: list[readers.Task]) -> Path:
    """The file of a tokenizer trained on the documents that are not held out."""
    assert options.train_tokenizer
    file = options.work / options.trained_tokenizer.name
    if not file.is_file():
        write_whole(file, tokenizer.train(_training_texts(options, tasks), options.train_tokenizer))
    return file


def _training_texts(options: Options, tasks: list[readers.Task]) -> Iterator[str]:
    counts, left = parts.Counts(), options.max_bytes
    for task in tasks:
        part = parts.Counts()
        for text in parts.documents(task, options, part):
            if left is not None:
                left -= readers.size_of(text)
                if left < 0:
                    return
            if not parts.is_held_out(text, options.held_out, options.seed):
                yield text
        counts.add(part, options.max_bad)


def _join(step: parts.Tokenise, outputs: list[publish.Output], progress: Progress) -> parts.Counts:
    """Run the tasks and write their parts in order."""
    options, logs, count = step.options, step.options.work / "tasks", len(step.tasks)
    workers = min(options.workers or len(os.sched_getaffinity(0)), count)
    executor: executors.Local | executors.Slurm = executors.Local([step], count, workers, str(logs))
    if options.executor == "slurm":
        executor = executors.Slurm([step], count, options.workers, logs, options.slurm)
    todo = executor.get_incomplete_ranks()
    counts, done = parts.Counts(), set(range(count)).difference(todo)
    with contextlib.closing(executor.finished(todo)) as finished:
        for rank, task in enumerate(step.tasks):
            while rank not in done:
                done.add(next(finished))
            tokens, table, part = parts.load(options.work, rank, step.tokenizer.dtype)
            counts.add(part, options.max_bad)
            fit = publish.fitting(table, outputs, options)
            for output in outputs:
                output.append(tokens, table[:fit])
            progress(sum(piece.size for piece in task))
            if fit < len(table):
                break
    return counts
