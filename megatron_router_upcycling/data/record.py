"""The options of ``prepare-data``, and the record that it writes next to its data.

``PREFIX.json`` is written after ``PREFIX.bin`` and ``PREFIX.idx``, so data that has a record is complete.
This module imports nothing heavy, so that training can read a record before it imports Megatron.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, described, shown
from megatron_router_upcycling.files import write_whole

FORMAT = 2  # format 1 is read too; its ``tokenizer_sha256`` is a digest of the tokenizer's files


@dataclass(frozen=True)
class Options:
    """The flags of ``prepare-data``; see its help for their meaning."""

    output: Path
    tokenizer: Path | None  # None: one is trained
    train_tokenizer: int | None
    text_key: str
    held_out: float
    seed: int
    end_of_document: bool
    max_tokens: int | None
    max_bytes: int | None
    max_document_bytes: int
    max_bad: int
    workers: int | None  # at a time; None: one a core, or with Slurm no limit
    executor: str
    slurm: dict[str, str]  # options of sbatch
    overwrite: bool

    @property
    def held_out_prefix(self) -> Path:
        return self.output.with_name(f"{self.output.name}_held_out")

    @property
    def prefixes(self) -> list[Path]:
        """Prefixes of the training data and, if documents are held out, of the held-out data."""
        return [self.output, self.held_out_prefix] if self.held_out else [self.output]

    @property
    def work(self) -> Path:
        """The hidden folder of the parts."""
        return self.output.with_name(f".{self.output.name}.parts")

    @property
    def trained_tokenizer(self) -> Path:
        return self.output.with_name(f"{self.output.name}.tokenizer.model")

    def decisive(self) -> dict[str, Any]:
        """The options that change what is written, except the tokenizer."""
        others = ("output", "tokenizer", "workers", "executor", "slurm", "overwrite")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True)
class Record:
    """The record of one prefix: what its tokens are and where they come from."""

    documents: int
    tokens: int  # end-of-document tokens included
    bytes: int  # of the documents' text in UTF-8
    bytes_per_token: float
    longest_document: int  # in tokens
    vocab_size: int  # every token is below it
    tokenizer: str  # the folder or file that was given, or what was trained
    tokenizer_sha256: str  # see ``tokenizer.sha256_of``
    dtype: str  # of a token in PREFIX.bin: uint16 or int32
    end_of_document: int | None  # the token that ends every document, if there is one
    empty: int  # blank lines and texts without a character or a token; not counted as documents
    skipped_count: int  # bad documents skipped under --max-bad
    skipped: list[dict[str, Any]]  # the first of these: file, line (or row, or item) and why
    left_out: dict[str, int]  # number of files of unknown kind in the folders, by suffix
    options: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    def write(self, prefix: Path) -> None:
        """Write ``prefix``.json whole or not at all."""
        content = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_whole(path_of(prefix), content + "\n")


def path_of(prefix: Path, suffix: str = ".json") -> Path:
    return prefix.with_name(prefix.name + suffix)


def read(prefix: Path) -> Record | None:
    """The record of the data ``prefix``; None if there is none, as for data from other tools."""
    path = path_of(prefix)
    try:
        entries = json.loads(path.read_bytes())
        kept = {field.name: entries[field.name] for field in dataclasses.fields(Record)}
        for field in dataclasses.fields(Record):
            if field.type in (int, str) and type(kept[field.name]) is not field.type:
                raise ValueError(f"{field.name} is {shown(kept[field.name])}")
        if kept["format"] not in (1, FORMAT):
            raise ValueError(f"it is of format {kept['format']}, and this version reads 1 and {FORMAT}")
        return Record(**kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = described(error)
        raise UserError(f"{path}: is no record of prepare-data ({why}); run prepare-data again") from None
