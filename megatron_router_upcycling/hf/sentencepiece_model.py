"""A tokenizer of sentencepiece in the form that transformers, vLLM and SGLang load."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.errors import described

FILES = ("tokenizer.json", "tokenizer_config.json")
# Held against sentencepiece's own tokens, with the text of this file.
SAMPLES = ("  two  spaces\n\n\tand a tab ", "naïve café, 数学, \U0001f642\r\n", " ", "\n", "a\u00a0b")


def find(folder: Path) -> Path | None:
    """The only model of sentencepiece in ``folder``, where no Hugging Face tokenizer is beside it."""
    found = beside.tokenizer_of(folder)
    return found[1] if found and found[1].is_file() else None


def special_tokens(model: Path) -> dict[str, int]:
    """The ids of special tokens as config.json has them."""
    from sentencepiece import SentencePieceProcessor

    try:
        own = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        return {}
    return {f"{name}_id": number for name, number in _tokens(own).items() if name != "unk_token"}


def convert(model: Path, folder: Path) -> str:
    """Write ``model`` to ``folder``, which holds a config.json, as transformers converts it.

    Returns:
        Why nothing was written; "" where all was.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        return f"transformers, which converts {model.name}, is not installed (the hf extra)"
    from sentencepiece import SentencePieceProcessor

    try:
        own = SentencePieceProcessor(model_file=str(model))
        with tempfile.TemporaryDirectory() as place:
            shutil.copyfile(model, Path(place) / "tokenizer.model")  # the name that transformers looks for
            made = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
        made.backend_tokenizer.save(str(folder / FILES[0]))
        _write_config(own, folder / FILES[1])
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = (*SAMPLES, Path(__file__).read_text(encoding="utf-8"))
        if all(loaded.encode(text, add_special_tokens=False) == own.encode(text) for text in texts):
            return ""
        fault = f"for {model.name} transformers would load a {type(loaded).__name__} with other tokens"
    except Exception as error:  # of sentencepiece, transformers, tokenizers or protobuf
        fault = f"{model.name} cannot be converted ({described(error)})"
    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    return fault


def _tokens(own: Any) -> dict[str, int]:
    """The special tokens that a model of sentencepiece has, by transformers' names."""
    ids = {f"{name}_token": getattr(own, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
    return {name: number for name, number in ids.items() if number >= 0}


def _write_config(own: Any, path: Path) -> None:
    tokens = {name: own.id_to_piece(number) for name, number in _tokens(own).items()}
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path.write_text(json.dumps(entries | tokens, indent=2) + "\n", encoding="utf-8")
