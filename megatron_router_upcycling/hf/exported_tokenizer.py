"""The tokenizer of an exported folder: ``AutoTokenizer`` is to give the tokens of training."""

import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.data import tokenizer
from megatron_router_upcycling.errors import described

CONFIG = "tokenizer_config.json"
# Every version of transformers takes this class for the rules in tokenizer.json. transformers 5 writes
# "TokenizersBackend", which transformers 4 does not know.
BY_THE_FILE = "PreTrainedTokenizerFast"
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def agree(source: Path, folder: Path, trained_with: Path | None) -> str:
    """Make the tokenizer in ``folder``, whose files are copies of those in ``source``, give the same tokens.

    Qwen's own files stay as they are. Others get a tokenizer.json, where they have none, and the class that
    reads it in any version of transformers (``tokenizer.of_folder`` says what another class would do).

    Args:
        trained_with: the checkpoint's own tokenizer, where ``source`` is another one that was asked for.

    Returns:
        What the user must know, as a sentence; "" where ``AutoTokenizer`` gives the tokens of training.
    """
    try:
        trained = tokenizer.of_folder(source)
        digest = tokenizer.sha256_of(trained)
        other = trained_with and tokenizer.load(trained_with).sha256 != digest
    except Exception as error:  # whatever the many parts of transformers raise, or that it is not installed
        why = described(error).replace(str(source), "it")
        return f"transformers cannot load it, and it was copied as it is ({why})"
    entries = _entries(folder / CONFIG)
    if isinstance(extra := entries.get("extra_special_tokens"), list):  # of transformers 5; a fault in 4
        del entries["extra_special_tokens"]
        entries.setdefault("additional_special_tokens", extra)
    found, kind = _given(folder)
    if not (_knows_version_5() and entries.get("tokenizer_class") in QWEN and found == digest):
        if not (folder / tokenizer.TOKENIZER_JSON).is_file():
            trained.backend_tokenizer.save(str(folder / tokenizer.TOKENIZER_JSON))
        entries.pop("auto_map", None)
        entries["tokenizer_class"] = BY_THE_FILE
    if entries != _entries(folder / CONFIG):
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        found, kind = _given(folder)
    if other:
        return "the one that was asked for gives other tokens than the one beside the checkpoint"
    if found == digest:
        return ""
    return (
        f"AutoTokenizer gives other tokens than those of training ({kind});"
        f" {BY_THE_FILE}.from_pretrained gives the right ones"
    )


def _knows_version_5() -> bool:
    """Whether what is installed shows what transformers 5 makes of a folder."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def _entries(path: Path) -> dict[str, Any]:
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return entries if isinstance(entries, dict) else {}


def _given(folder: Path) -> tuple[str, str]:
    """The digest of what ``AutoTokenizer`` loads, or "", and which class that is or why there is none."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return tokenizer.sha256_of(loaded), f"it takes {type(loaded).__name__} here"
    except Exception as error:
        return "", described(error)
