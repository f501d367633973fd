"""Files of a Hugging Face folder beside its weights."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError

GENERATION_CONFIG = "generation_config.json"

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MODELLING_FILE = "modeling_upcycled_qwen_moe.py"
CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZER = "tokenizer"
# A folder with one of these holds a tokenizer; what else there is of it goes along.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
BESIDE_TOKENIZER = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
    CONFIG,
)


def find_tokenizer(asked: Path | None, checkpoint: Checkpoint) -> Path | None:
    """The folder of the tokenizer: the one asked for, the one that training used, or none.

    Raises:
        UserError: the one asked for holds no tokenizer.
    """
    if asked is not None:
        if not is_tokenizer(asked):
            raise UserError(f"--tokenizer {asked}: holds none of {', '.join(TOKENIZER_FILES)}")
        return asked
    used = getattr(checkpoint.args, "tokenizer_model", None)
    if getattr(checkpoint.args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        used = None
    for folder in (used, checkpoint.root / TOKENIZER):
        if folder is not None and is_tokenizer(Path(folder)):
            return Path(folder)
    return None


def shard_name(number: int, count: int) -> str:
    """The name of a file of weights, counted from 1."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy the tokenizer's files; return the ids of its special tokens as config.json has them."""
    copy_files(source, target, [file for file in TOKENIZER_FILES + BESIDE_TOKENIZER if file != CONFIG])
    for file in (CONFIG, GENERATION_CONFIG):
        if (source / file).is_file():
            found = read_json(source / file)
            return {name: found[name] for name in SPECIAL_TOKENS if found.get(name) is not None}
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: it is missing, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a Hugging Face folder") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, or cut short; download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that transformers loads."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def copy_files(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy those of ``files`` that there are."""
    for file in files:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
