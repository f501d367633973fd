"""Where the data appears: files that begin with PREFIX, each pair of them whole or not there.

An index (.idx) comes after its tokens (.bin) and the record after both; where old data is replaced, its
record and index go first. So nobody reads half of one and half of another, whenever the machine stops.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync

TOKENIZER = "tokenizer.model"
PUBLISHING = "publishing"  # stands in the folder of parts once old data may be gone


def tokenizer_of(prefix: Path) -> Path:
    """The place of a tokenizer that was trained on the text."""
    return prefix.with_name(f"{prefix.name}.{TOKENIZER}")


def _files(prefix: Path) -> list[Path]:
    """The files of a prefix, in the order in which they go."""
    return [prefix.with_name(prefix.name + suffix) for suffix in (".json", ".idx", ".bin")]


def check(options: Options, sources: Iterable[Path]) -> None:
    """Refuse a place where something would be lost. Touches nothing."""
    output, texts = options.output, {path.resolve() for path in sources}
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: is a folder; add the name that the files shall begin with")
    for prefix in options.prefixes:
        for path in (*_files(prefix), tokenizer_of(prefix)):
            if path.resolve() in texts:
                raise UserError(f"--output {output}: {path} is one of the sources; name another place")
        there = [path for path in _files(prefix) if path.exists()]
        if not there or (options.work / PUBLISHING).exists():
            continue  # what is there is half of the data that will be made now
        if not options.overwrite or record.read(prefix) is None:
            raise UserError(
                f"--output {output}: {there[0]} exists; name another place, or pass --overwrite to replace"
                f" what prepare-data has made, as {record.path_of(prefix).name} says"
            )


def publish(options: Options, made: list[Path], records: list[record.Record]) -> None:
    """Give the files of the prefixes ``made`` their names, held-out data first, and write the records.

    Raises:
        OSError: they cannot be written.
    """
    output, work = options.output, options.work
    for prefix in made:
        for file in _files(prefix)[1:]:
            sync(file)
    old = record.read(output)
    held_out = old is not None and bool(old.options.get("held_out"))
    (work / PUBLISHING).touch()
    for prefix in options.prefixes + [output.with_name(f"{output.name}_held_out")] * held_out:
        for file in _files(prefix):
            file.unlink(missing_ok=True)
    tokenizer_of(output).unlink(missing_ok=True)
    if (work / TOKENIZER).exists():
        os.replace(work / TOKENIZER, tokenizer_of(output))
    for prefix, target, entries in reversed(list(zip(made, options.prefixes, records, strict=True))):
        for file, place in reversed(list(zip(_files(prefix), _files(target), strict=True))):
            if file.suffix != ".json":
                os.replace(file, place)
        entries.write(target)
    sync(output.parent)
