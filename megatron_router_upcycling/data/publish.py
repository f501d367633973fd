"""Where the data appears: files that begin with PREFIX, each pair of them whole or not there.

An index (.idx) comes after its tokens (.bin) and the record after both; where old data is replaced, its
record and index go first. So nobody reads half of one and half of another, whenever the machine stops.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_router_upcycling.data import record
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sync

TOKENIZER = "tokenizer.model"
PUBLISHING = "publishing"  # stands in the folder of parts once old data may be gone


def tokenizer_of(prefix: Path) -> Path:
    """The place of a tokenizer that was trained on the text."""
    return prefix.with_name(f"{prefix.name}.{TOKENIZER}")


def _files(prefix: Path) -> list[Path]:
    """The files of a prefix, in the order in which they go."""
    return [record.path_of(prefix), *(prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))]


def check(prefixes: Sequence[Path], sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse a place where something would be lost. Touches nothing.

    Raises:
        UserError: files are there and ``overwrite`` is not set, or they are not of ``prepare-data``, or they
            are (or lie among) the text.
    """
    output = prefixes[0]
    if not output.name or output.is_dir():
        raise UserError(f"--output {output}: is a folder; add the name that the files shall begin with")
    texts = {path.resolve() for path in sources}
    wanted = [*(file for prefix in prefixes for file in _files(prefix)), tokenizer_of(output)]
    if named := [path for path in wanted if path.resolve() in texts]:
        raise UserError(f"--output {output}: {named[0]} is one of the sources; name another place")
    if (output.with_name(f".{output.name}.parts") / PUBLISHING).exists():
        return  # what is there is half of the data that will be made now
    for prefix in prefixes:
        there = [path for path in _files(prefix) if path.exists()]
        if there and not overwrite:
            raise UserError(
                f"--output {output}: {there[0]} exists; pass --overwrite to replace it or name another"
            )
        if there and record.read(prefix) is None:
            raise UserError(
                f"--output {output}: {there[0]} has no record of prepare-data beside it, so --overwrite"
                " leaves it alone; remove it or name another place"
            )


def publish(work: Path, prefixes: Sequence[Path], records: Sequence[record.Record], trained: bool) -> None:
    """Give the files in ``work``/out their names, held-out data first, and write the records.

    Raises:
        OSError: they cannot be written.
    """
    made = {prefix: work / "out" / prefix.name for prefix in prefixes}
    for path in made.values():
        for file in _files(path)[1:]:
            sync(file)
    output = prefixes[0]
    old = [output, output.with_name(output.name + "_held_out")] if _had_held_out(output) else prefixes
    (work / PUBLISHING).touch()
    for prefix in old:
        for file in _files(prefix):
            file.unlink(missing_ok=True)
    tokenizer_of(output).unlink(missing_ok=True)
    if trained:
        os.replace(work / TOKENIZER, tokenizer_of(output))
    for prefix, entries in reversed(list(zip(prefixes, records, strict=True))):
        for source, target in reversed(list(zip(_files(made[prefix])[1:], _files(prefix)[1:], strict=True))):
            os.replace(source, target)
        entries.write(prefix)
    sync(output.parent)


def _had_held_out(prefix: Path) -> bool:
    try:
        old = record.read(prefix)
    except UserError:
        return False
    return old is not None and bool(old.options.get("held_out"))


@contextlib.contextmanager
def parents_of(output: Path) -> Iterator[None]:
    """Make the folders above ``output``; those that were made go again where the context fails.

    Raises:
        UserError: they cannot be made.
    """
    created = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for parent in created:
            with contextlib.suppress(OSError):  # a run that was stopped keeps its parts there
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
        raise
