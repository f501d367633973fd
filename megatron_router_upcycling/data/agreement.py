"""Whether data and a model go together: the tokenizer that made the tokens, and ids within the vocabulary."""

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.data import record
from megatron_router_upcycling.data.tokenizer import Tokenizer, load
from megatron_router_upcycling.errors import UserError

# The header of an .idx file (megatron.core.datasets.indexed_dataset): a mark, version, code of the dtype, and
# how many sequences and document ends there are. Lengths (int32), places (int64) and ends (int64) follow.
MARK, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
LOOKED_AT = 64  # pieces of a .bin file, from its first to its last token,
PIECE = 1 << 20  # of as many bytes each
ALSO_DECIDES = {"vocab.json": ("merges.txt",)}  # beside the file that says that there is a tokenizer


def check(prefixes: Iterable[str], tokenizer: Path | None, vocabulary: int) -> None:
    """Refuse data whose tokens are not those of the model.

    An index must be that of the tokens beside it. Where ``prepare-data`` has left its record, that is asked.
    Of data that other tools made up to 64 MiB of tokens are looked at, evenly; the rest is, batch by batch,
    as training reads it.

    Args:
        prefixes: of .bin and .idx files that are there.
        tokenizer: the model's, a Hugging Face folder or a sentencepiece file; None if it is not known.
        vocabulary: the rows of the model's embedding.

    Raises:
        UserError: names the prefix.
    """
    tokenizer_of = functools.cache(functools.partial(load, flag="--tokenizer-model"))
    for prefix in prefixes:
        made = record.read(Path(prefix))
        dtype = read_index(prefix, made)
        if made is None:
            check_ids(f"--data-path {prefix}", _largest(Path(f"{prefix}.bin"), dtype), vocabulary)
            continue
        if made.vocab_size > vocabulary:
            raise UserError(
                f"--data-path {prefix}: made with a vocabulary of {made.vocab_size} ({made.tokenizer}),"
                f" and the model has {vocabulary}; prepare the text with the model's own tokenizer"
            )
        if tokenizer and not _made_with(made, tokenizer, tokenizer_of):
            raise UserError(
                f"--data-path {prefix}: made with another tokenizer ({made.tokenizer}) than the model's"
                f" ({tokenizer}); prepare the text again with that one, or remove"
                f" {record.path_of(Path(prefix))} if their tokens are the same"
            )


def _made_with(made: record.Record, tokenizer: Path, tokenizer_of: Callable[[Path], Tokenizer]) -> bool:
    """Whether ``tokenizer``, in whatever form, gives the tokens of the data.

    Records of format 1 know the files that were used and not what decides tokens: where the model has other
    files, those that were used are read, if they are still in their place.
    """
    if made.format == record.FORMAT:
        return made.tokenizer_sha256 == tokenizer_of(tokenizer).sha256
    if made.tokenizer_sha256 == files_sha256(tokenizer):
        return True
    used = Path(made.tokenizer)
    return (
        made.tokenizer_sha256 == files_sha256(used)
        and tokenizer_of(used).sha256 == tokenizer_of(tokenizer).sha256
    )


def check_ids(where: str, largest: int, vocabulary: int) -> None:
    """Refuse a token beyond the vocabulary.

    Raises:
        UserError: ``where`` names the data.
    """
    if largest >= vocabulary:
        raise UserError(
            f"{where}: holds token {largest}, and the model's vocabulary has {vocabulary} (0 to"
            f" {vocabulary - 1}); prepare the text with the model's own tokenizer"
        )


def read_index(prefix: str, made: record.Record | None = None) -> type[np.number]:
    """The dtype of the tokens in ``prefix``.bin, once its .idx is known to be that file's.

    Args:
        made: what ``prepare-data`` recorded of them, if it did.

    Raises:
        UserError: the .idx is no index, is cut short, or is of other tokens than the .bin or the record.
    """
    from megatron.core.datasets.indexed_dataset import DType

    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with open(index, "rb") as file:
        head = file.read(HEADER.size)
    try:
        mark, version, code, sequences, documents = HEADER.unpack(head)
        if mark != MARK or version != 1:
            raise ValueError("it does not begin as one")
        kind: type[np.number] = DType.dtype_from_code(code)
    except (ValueError, struct.error) as error:
        raise UserError(f"--data-path {index}: is no index of Megatron data ({error})") from None
    if index.stat().st_size < HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"--data-path {index}: is cut short; copy it again")
    lengths: np.ndarray = np.zeros(0, np.int32)
    if sequences:
        lengths = np.memmap(index, np.int32, "r", HEADER.size, (sequences,))
    counted, size = int(lengths.sum(dtype=np.int64)), np.dtype(kind).itemsize
    stored = tokens.stat().st_size
    if counted * size != stored:
        raise UserError(
            f"--data-path {prefix}: {index.name} counts {counted * size} bytes of tokens, and {tokens.name}"
            f" has {stored}: one was cut short, or they are of different data; copy both again"
        )
    if made and (made.tokens, made.documents) != (counted, documents - 1):
        raise UserError(
            f"--data-path {prefix}: {index.name} has {documents - 1} documents of {counted} tokens, and"
            f" {record.path_of(Path(prefix)).name} was written for {made.documents} of {made.tokens}; copy"
            " all three files again"
        )
    return kind


def _largest(path: Path, dtype: type[np.number]) -> int:
    """The largest token among those that are looked at."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    if not count:
        return -1
    tokens: np.ndarray = np.memmap(path, dtype, "r", shape=(count,))
    step = PIECE // np.dtype(dtype).itemsize
    starts = range(0, count, step)
    if len(starts) > LOOKED_AT:
        starts = np.linspace(0, count - step, LOOKED_AT).astype(int).tolist()
    return max(int(tokens[start : start + step].max()) for start in starts)


def files_sha256(place: Path) -> str | None:
    """The digest that records of format 1 hold: of a tokenizer's files. None if there is none."""
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    for first in beside.TOKENIZER_FILES:
        if (place / first).is_file():
            digest = hashlib.sha256()
            for name in (first, *ALSO_DECIDES.get(first, ())):
                content = (place / name).read_bytes() if (place / name).is_file() else b""
                digest.update(_decisive(content) if name == "tokenizer.json" else content)
            return digest.hexdigest()
    return None


def _decisive(content: bytes) -> bytes:
    try:
        entries = json.loads(content)
        model = entries["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        added = sorted((token["id"], token["content"]) for token in entries.get("added_tokens") or ())
        kept = [model["vocab"], merges, added, entries.get("normalizer"), entries.get("pre_tokenizer")]
        return json.dumps(kept, sort_keys=True).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return content
