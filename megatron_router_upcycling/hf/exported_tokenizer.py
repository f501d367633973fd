"""The tokenizer of an exported folder: ``AutoTokenizer`` must give the tokens of training.

A sentencepiece model is converted to the form that transformers, vLLM and SGLang load.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_router_upcycling.data import tokenizer
from megatron_router_upcycling.errors import described
from megatron_router_upcycling.hf import files

CONFIG = "tokenizer_config.json"
# With this class, every version of transformers follows the rules in tokenizer.json. transformers 5 writes
# "TokenizersBackend", which transformers 4 does not know.
BY_THE_FILE = "PreTrainedTokenizerFast"
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Texts, in addition to this file, whose tokens must equal sentencepiece's own.
SAMPLES = ("  two  spaces\n\n\tand a tab ", "naïve café, 数学, \U0001f642\r\n", " ", "\n", "a\u00a0b")


def agree(source: Path, folder: Path, trained_with: Path | None) -> str:
    """Make the tokenizer in ``folder``, whose files are copies of those in ``source``, give the same tokens.

    Qwen's own files are unchanged. Others get a tokenizer.json, where they have none, and the class that
    reads it in any version of transformers (``tokenizer.of_folder`` explains what another class would do).
    ``trained_with`` is the checkpoint's own tokenizer, where the user asked for another one, ``source``.

    Returns a warning for the user; "" where ``AutoTokenizer`` gives the tokens of training.
    """
    try:
        import transformers

        trained = tokenizer.of_folder(source)
        digest = tokenizer.sha256_of(trained)
        other = trained_with and tokenizer.load(trained_with).sha256 != digest
    except Exception as error:  # transformers raises many kinds, or is not installed
        why = described(error).replace(str(source), "it")
        return f"transformers cannot load it, and it was copied as it is ({why})"
    entries = _entries(folder / CONFIG)
    if isinstance(extra := entries.get("extra_special_tokens"), list):  # of transformers 5; an error in 4
        del entries["extra_special_tokens"]
        entries.setdefault("additional_special_tokens", extra)
    found, kind = _given(folder)
    shows_version_5 = int(transformers.__version__.split(".")[0]) >= 5  # what version 5 loads
    if not (shows_version_5 and entries.get("tokenizer_class") in QWEN and found == digest):
        if not (folder / tokenizer.TOKENIZER_JSON).is_file():
            trained.backend_tokenizer.save(str(folder / tokenizer.TOKENIZER_JSON))
        entries.pop("auto_map", None)
        entries["tokenizer_class"] = BY_THE_FILE
    if entries != _entries(folder / CONFIG):
        files.write_json(folder / CONFIG, entries)
        found, kind = _given(folder)
    if other:
        return "the one that was asked for gives other tokens than the one beside the checkpoint"
    if found == digest:
        return ""
    return (
        f"AutoTokenizer gives other tokens than those of training ({kind});"
        f" {BY_THE_FILE}.from_pretrained gives the right ones"
    )


def _entries(path: Path) -> dict[str, Any]:
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return entries if isinstance(entries, dict) else {}


def _given(folder: Path) -> tuple[str, str]:
    """The digest of what ``AutoTokenizer`` loads and its class, or "" and why it loads nothing."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return tokenizer.sha256_of(loaded), f"it takes {type(loaded).__name__} here"
    except Exception as error:
        return "", described(error)


def convert(model: Path, folder: Path) -> tuple[str, dict[str, int]]:
    """Convert the sentencepiece ``model`` with transformers, into ``folder``, which holds a config.json.

    Returns why nothing was written, or ""; and the special tokens' ids, as entries of config.json.
    """
    ids: dict[str, int] = {}
    try:
        from sentencepiece import SentencePieceProcessor
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        own = SentencePieceProcessor(model_file=str(model))
        found = {f"{name}_token_id": getattr(own, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        ids = {name: number for name, number in found.items() if number >= 0}
        with tempfile.TemporaryDirectory() as place:
            shutil.copyfile(model, Path(place) / "tokenizer.model")  # the name that transformers looks for
            made = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
        made.backend_tokenizer.save(str(folder / tokenizer.TOKENIZER_JSON))
        entries = {"tokenizer_class": BY_THE_FILE, "clean_up_tokenization_spaces": False}
        entries |= {name.removesuffix("_id"): own.id_to_piece(number) for name, number in ids.items()}
        files.write_json(folder / CONFIG, entries)
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = (*SAMPLES, Path(__file__).read_text(encoding="utf-8"))
        if all(loaded.encode(text, add_special_tokens=False) == own.encode(text) for text in texts):
            return "", ids
        fault = f"for {model.name} transformers would load a {type(loaded).__name__} with other tokens"
    except Exception as error:  # raised by one of these libraries, or it is not installed
        fault = f"{model.name} cannot be converted ({described(error)})"
    for file in (tokenizer.TOKENIZER_JSON, CONFIG):
        (folder / file).unlink(missing_ok=True)
    return fault, ids
