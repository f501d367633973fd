"""Tokenizers: load the one that ``--tokenizer`` names into a fast library, or train one on the text."""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.data import encoders
from megatron_router_upcycling.errors import UserError, described, error_as

TOKENIZER_JSON = "tokenizer.json"
# A tokenizer is trained on at most this many lines: sentencepiece holds them in memory.
TRAINING_LINES = 2_000_000


@dataclass(frozen=True)
class Tokenizer:
    """What a worker needs to build an encoder, and what the record says about the tokenizer."""

    place: Path
    sha256: str  # of all that decides tokens: see ``sha256_of``
    vocab_size: int
    end_of_document: int | None
    definition: str | bytes  # tokenizer.json of the tokenizers library, or a sentencepiece model
    encode_special_tokens: bool = False  # whether "<|endoftext|>" in a text is plain text

    @property
    def dtype(self) -> Any:
        """The smallest type that holds the vocabulary, as Megatron's ``DType.optimal_dtype`` chooses it."""
        return numpy.uint16 if self.vocab_size < 65500 else numpy.int32

    def encoder(self, tiktoken: bool = False) -> encoders.Encoder:
        return encoders.of(self.definition, self.encode_special_tokens, tiktoken)


def load(place: Path, flag: str = "--tokenizer") -> Tokenizer:
    """The tokenizer in ``place``, a Hugging Face folder or a file of sentencepiece; errors name ``flag``."""
    if not place.is_file() and not beside.is_tokenizer(place):
        names = " or ".join(beside.TOKENIZER_FILES)
        raise UserError(f"{flag} {place}: is no file, and no folder with {names}")
    fault = "is no model of sentencepiece" if place.is_file() else "transformers cannot load it"
    # transformers raises many types, also where it has only a slow tokenizer.
    with error_as(Exception, f"{flag} {place}: {fault}", "; give another", described):
        return _of_sentencepiece(place) if place.is_file() else _of_hugging_face(place)


def _of_hugging_face(place: Path) -> Tokenizer:
    loaded = of_folder(place)
    ends = (loaded.eos_token_id, loaded.sep_token_id)  # as Megatron's tokenizer chooses
    return Tokenizer(
        place,
        sha256_of(loaded),
        max(len(loaded), *(token + 1 for token in loaded.get_vocab().values())),
        next((token for token in ends if token is not None), None),
        loaded.backend_tokenizer.to_str(),
        bool(getattr(loaded, "split_special_tokens", False)),
    )


def _of_sentencepiece(place: Path) -> Tokenizer:
    import sentencepiece

    definition = place.read_bytes()
    model, digest = sentencepiece.SentencePieceProcessor(model_proto=definition), hashlib.sha256(definition)
    end = model.eos_id() if model.eos_id() >= 0 else None
    return Tokenizer(place, digest.hexdigest(), model.get_piece_size(), end, definition)


def of_folder(place: Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a folder, with the rules of its tokenizer.json if it holds one.

    ``AutoTokenizer`` is not enough: transformers 5 uses the class that the folder names, or for
    ``model_type: qwen2`` always Qwen2Tokenizer, whose rules override the file's. So the same file would give
    other tokens next to another model's config.json. Only vocab.json with merges.txt needs a class.
    """
    if (place / TOKENIZER_JSON).is_file():
        from transformers import PreTrainedTokenizerFast as Kind
    else:
        from transformers import AutoTokenizer as Kind  # imports PyTorch
    return Kind.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)


def sha256_of(loaded: Any) -> str:
    """A digest of everything that affects encoding; it is the same however the tokenizer was saved.

    ``loaded`` is a fast tokenizer of transformers. Decoding rules and character offsets are left out.
    """
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    content = json.loads(backend.to_str())
    model, normalizer = content["model"], _decisive(content["normalizer"])
    rest = _decisive({name: value for name, value in model.items() if name not in ("vocab", "merges")})
    if "unk_token" not in rest:
        rest.pop("fuse_unk", None)
    flags = ["id", "content", "single_word", "lstrip", "rstrip"]
    flags += ["normalized"] * bool(normalizer) + ["special"] * backend.encode_special_tokens
    kept = {
        "model": [model["vocab"], model.get("merges"), rest],
        "normalizer": normalizer,
        "pre_tokenizer": _decisive(content["pre_tokenizer"]),
        "added_tokens": [[token[flag] for flag in flags] for token in content["added_tokens"]],
        "around": [backend.encode("a", add_special_tokens=around).ids for around in (False, True)],
        "encode_special_tokens": backend.encode_special_tokens,
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _decisive(part: Any) -> Any:
    """A part of a tokenizer in canonical form: disabled settings dropped, sequences of one unwrapped."""
    if isinstance(part, list):
        return [_decisive(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {name: _decisive(value) for name, value in part.items() if name != "trim_offsets"}
    kept = {name: value for name, value in kept.items() if value not in (None, "") and value is not False}
    items = kept.get("normalizers", kept.get("pretokenizers"))
    return items[0] if kept.get("type") == "Sequence" and items and len(items) == 1 else kept


def train(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-pair model whose decoding restores every text exactly, whitespace included."""
    import sentencepiece

    # Read here and not by sentencepiece, which would replace an error in the text by one of its own.
    lines = list(islice((line for text in documents for line in text.split("\n") if line), TRAINING_LINES))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            pad_id=3,  # after unk 0, bos 1 and eos 2; eos is Megatron's end of document
            input_sentence_size=TRAINING_LINES,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        why = str(error).rsplit("] ", 1)[-1].strip() or "sentencepiece gives no reason"
        raise UserError(f"--train-tokenizer {vocab_size}: does not suit this text: {why}") from None
    return model.getvalue()
