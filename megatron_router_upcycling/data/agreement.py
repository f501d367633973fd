"""Whether data and a model go together: the tokenizer that made the tokens, and ids within the vocabulary."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.tokenizer import load
from megatron_router_upcycling.errors import UserError, reason

LOOKED_AT = 1 << 26  # bytes of a .bin file


def check(prefixes: Iterable[str], tokenizer: Path | None, vocabulary: int) -> None:
    """Refuse data whose tokens are not those of the model.

    An index must be that of the tokens beside it. Where ``prepare-data`` has left its record, that is asked;
    records of format 1 do not say which tokenizer gives their tokens. Of data that other tools made the
    first 64 MiB of tokens are looked at; the rest is, batch by batch, as training reads it.

    Args:
        prefixes: of .bin and .idx files that are there.
        tokenizer: the model's, a Hugging Face folder or a sentencepiece file; None if it is not known.
        vocabulary: the rows of the model's embedding.
    """
    expected = ""
    for prefix in prefixes:
        made = record.read(Path(prefix))
        dtype = _read_index(prefix, made)
        if made is None:
            check_ids(f"--data-path {prefix}", _largest(Path(f"{prefix}.bin"), dtype), vocabulary)
            continue
        if made.vocab_size > vocabulary:
            raise UserError(
                f"--data-path {prefix}: made with a vocabulary of {made.vocab_size} ({made.tokenizer}),"
                f" and the model has {vocabulary}; prepare the text with the model's own tokenizer"
            )
        if tokenizer is None or made.format != record.FORMAT:
            continue
        expected = expected or load(tokenizer, "--tokenizer-model").sha256
        if made.tokenizer_sha256 != expected:
            raise UserError(
                f"--data-path {prefix}: made with another tokenizer ({made.tokenizer}) than the model's"
                f" ({tokenizer}); prepare the text again with that one, or remove"
                f" {record.path_of(Path(prefix))} if their tokens are the same"
            )


def check_ids(where: str, largest: int, vocabulary: int) -> None:
    """Refuse a token beyond the vocabulary. ``where`` names the data."""
    if largest >= vocabulary:
        raise UserError(
            f"{where}: holds token {largest}, and the model's vocabulary has {vocabulary} (0 to"
            f" {vocabulary - 1}); prepare the text with the model's own tokenizer"
        )


def _read_index(prefix: str, made: record.Record | None) -> type[np.number]:
    """The dtype of the tokens in ``prefix``.bin, once its .idx is known to be that file's.

    Args:
        made: what ``prepare-data`` recorded of them, if it did.
    """
    from megatron.core.datasets.indexed_dataset import _IndexReader

    tokens = Path(f"{prefix}.bin")
    try:
        index = _IndexReader(f"{prefix}.idx", multimodal=False)
    except Exception as error:  # Megatron's assertions, and numpy's of a file that is too short
        raise UserError(
            f"--data-path {prefix}.idx: is no index of Megatron data, or cut short ({reason(error)}); copy it"
            " again"
        ) from None
    counted, documents = int(index.sequence_lengths.sum(dtype=np.int64)), index.document_count
    stored = tokens.stat().st_size
    if counted * index.dtype_size != stored:
        raise UserError(
            f"--data-path {prefix}: its .idx counts {counted * index.dtype_size} bytes of tokens, and"
            f" {tokens.name} has {stored}: one was cut short, or they are of different data; copy both again"
        )
    if made and (made.tokens, made.documents) != (counted, documents - 1):
        raise UserError(
            f"--data-path {prefix}: its .idx has {documents - 1} documents of {counted} tokens, and"
            f" {record.path_of(Path(prefix)).name} was written for {made.documents} of {made.tokens}; copy"
            " all three files again"
        )
    return index.dtype


def _largest(path: Path, dtype: type[np.number]) -> int:
    """The largest token in the beginning of a .bin file."""
    count = min(path.stat().st_size, LOOKED_AT) // np.dtype(dtype).itemsize
    return int(np.memmap(path, dtype, "r", shape=(count,)).max()) if count else -1
