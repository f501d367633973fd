"""What ``prepare-data`` is asked for, and what it writes down beside its data.

``PREFIX.json`` stands beside ``PREFIX.bin`` and ``PREFIX.idx`` and comes last, so that data with a record is
whole. This module imports nothing heavy: whoever is about to train may ask it before Megatron starts.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, described, shown
from megatron_router_upcycling.files import write_whole

FORMAT = 2  # and 1, where ``tokenizer_sha256`` is of the tokenizer's files


@dataclass(frozen=True)
class Options:
    """The flags of ``prepare-data``, which say what they mean."""

    output: Path
    tokenizer: Path | None  # or one is trained
    train_tokenizer: int | None
    text_key: str
    held_out: float
    seed: int
    end_of_document: bool
    max_tokens: int | None
    max_bytes: int | None
    max_document_bytes: int
    max_bad: int
    workers: int | None  # at a time: None for one a core, or for Slurm as many as it has room for
    executor: str
    slurm: dict[str, str]  # options of sbatch
    overwrite: bool

    @property
    def held_out_prefix(self) -> Path:
        return self.output.with_name(f"{self.output.name}_held_out")

    @property
    def prefixes(self) -> list[Path]:
        """Of training and, where some are held out, of held-out documents."""
        return [self.output, self.held_out_prefix] if self.held_out else [self.output]

    @property
    def work(self) -> Path:
        """The hidden folder of the parts."""
        return self.output.with_name(f".{self.output.name}.parts")

    @property
    def trained_tokenizer(self) -> Path:
        return self.output.with_name(f"{self.output.name}.tokenizer.model")

    def decisive(self) -> dict[str, Any]:
        """The options that change what is written, the tokenizer aside."""
        others = ("output", "tokenizer", "workers", "executor", "slurm", "overwrite")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True)
class Record:
    """One prefix: what its tokens are and where they come from."""

    documents: int
    tokens: int  # end-of-document tokens included
    bytes: int  # of the documents' text in UTF-8
    bytes_per_token: float
    longest_document: int  # in tokens
    vocab_size: int  # every token is below it
    tokenizer: str  # the folder or file that was given, or what was trained
    tokenizer_sha256: str  # of what decides its tokens: see ``tokenizer.sha256_of``
    dtype: str  # of a token in PREFIX.bin: uint16 or int32
    end_of_document: int | None  # the token that ends every document, if there is one
    empty: int  # blank lines and texts without a character or a token, which are no documents
    skipped_count: int  # bad documents that --max-bad let pass
    skipped: list[dict[str, Any]]  # the first of these: file, line (or row, or item) and why
    left_out: dict[str, int]  # files in folders that are of no known kind, by the end of their name
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
    """The record beside the data ``prefix``; None where there is none, as beside data of other tools."""
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
