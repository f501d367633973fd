"""What ``prepare-data`` writes down beside its data.

``PREFIX.json`` stands beside ``PREFIX.bin`` and ``PREFIX.idx`` and comes last, so that data with a record is
whole. This module imports nothing heavy: whoever is about to train may ask it before Megatron starts.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, reason, shown
from megatron_router_upcycling.files import write_whole

FORMAT = 2
EARLIER = 1  # where ``tokenizer_sha256`` is of the tokenizer's files


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


def path_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def read(prefix: Path) -> Record | None:
    """The record beside the data ``prefix``; None where there is none, as beside data of other tools."""
    path = path_of(prefix)
    try:
        entries = json.loads(path.read_bytes())
        kept = {field.name: entries[field.name] for field in dataclasses.fields(Record)}
        for field in dataclasses.fields(Record):
            if field.type in (int, str) and type(kept[field.name]) is not field.type:
                raise ValueError(f"{field.name} is {shown(kept[field.name])}")
        if kept["format"] not in (EARLIER, FORMAT):
            raise ValueError(
                f"it is of format {kept['format']}, and this version reads {EARLIER} and {FORMAT}"
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{path}: is no record of prepare-data ({why}); run prepare-data again") from None
    return Record(**kept)
