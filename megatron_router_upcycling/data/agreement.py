"""Check that data fits a model: made with the model's tokenizer, and no token id beyond the vocabulary."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.tokenizer import load
from megatron_router_upcycling.errors import UserError, error_as

LOOKED_AT = 1 << 26  # bytes of a .bin file, from its start


def check(prefixes: Iterable[str], tokenizer: Path | None, vocabulary: int) -> None:
    """Refuse data whose tokens are not those of the model.

    ``prepare-data`` records which tokenizer it used; records of format 1 lack its digest. For data from other
    tools, the first 64 MiB are checked here, and training checks the rest batch by batch.
    ``tokenizer`` is the model's, if it is known; ``vocabulary`` is the number of rows of its embedding.
    """
    digest = ""
    for prefix in prefixes:
        made = record.read(Path(prefix))
        dtype = _read_index(prefix, made)
        if made is None:
            tokens = np.fromfile(f"{prefix}.bin", dtype, LOOKED_AT // np.dtype(dtype).itemsize)
            check_ids(f"--data-path {prefix}", int(tokens.max(initial=0)), vocabulary)
            continue
        differs = made.vocab_size > vocabulary
        if tokenizer and made.format == record.FORMAT:
            digest = digest or load(tokenizer, "--tokenizer-model").sha256
            differs |= made.tokenizer_sha256 != digest
        if differs:
            raise UserError(
                f"--data-path {prefix}: made with another tokenizer ({made.tokenizer}, vocabulary"
                f" {made.vocab_size}) than the model's ({tokenizer or 'not known'}, {vocabulary}); prepare"
                f" the text with that, or remove {record.path_of(Path(prefix))} if the tokens are the same"
            )


def check_ids(where: str, largest: int, vocabulary: int) -> None:
    """Refuse a token beyond the vocabulary. ``where`` names the data."""
    if largest >= vocabulary:
        raise UserError(
            f"{where}: holds token {largest}, and the model's vocabulary has {vocabulary} (0 to"
            f" {vocabulary - 1}); prepare the text with the model's own tokenizer"
        )


def _read_index(prefix: str, made: record.Record | None) -> type[np.number]:
    """The dtype of the tokens in ``prefix``.bin, after checking the .idx against the .bin and the record."""
    from megatron.core.datasets.indexed_dataset import _IndexReader

    fault = f"--data-path {prefix}.idx: is no index of Megatron data, was cut short, or is of other data"
    # Megatron's assertions, and numpy's error where a file is too short.
    with error_as(Exception, fault, "; copy .bin, .idx and .json again"):
        index = _IndexReader(f"{prefix}.idx", multimodal=False)
        documents, tokens = index.document_count - 1, int(index.sequence_lengths.sum(dtype=np.int64))
        counted, stored = tokens * index.dtype_size, Path(f"{prefix}.bin").stat().st_size
        if counted != stored:
            raise ValueError(f"it counts {counted} bytes of tokens, and the .bin has {stored}")
        if made and (made.documents, made.tokens) != (documents, tokens):
            wanted = f"the record says {made.documents} of {made.tokens}"
            raise ValueError(f"it has {documents} documents of {tokens} tokens, and {wanted}")
    return index.dtype
