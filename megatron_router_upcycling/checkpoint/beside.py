"""The files that accompany a model's weights: tokenizer, chat templates, generation settings, licence.

Each checkpoint keeps them in ``ROOT/tokenizer``, hard-linked to its source checkpoint's. Pure: no torch.
"""

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_router_upcycling.files import sha256

FOLDER = "tokenizer"  # of a checkpoint's root
# A folder with one of these holds a tokenizer that transformers loads.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# Name patterns of the files to copy, matched case-insensitively. Other files could change how the folder is
# loaded: those of an adapter, a quantisation, a trainer, another model.
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template.json", "config.json", "generation_config.json"),
    *("licen[sc]e*", "copying*", "notice*", "readme*", "*.md"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# Subfolders, copied whole or not at all: chat templates and sentence-transformers' modules (1_Pooling).
COPIED_FOLDERS = ("*/*.jinja", "[0-9]_*/config.json")
ADAPTER = "adapter_config.json"
# Never copied, even if a pattern above matches.
NOT_COPIED = ("adapter_*", "*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.safetensors")
LARGEST = 256 << 20  # bytes; the largest tokenizers have 35 million
NAMED = 20  # of the files that are left out


class Found(NamedTuple):
    """The files of a folder to copy, by their relative paths, and the names of what is left out."""

    carried: list[Path]
    left_out: list[str]


def look(folder: Path, weights: Iterable[Path] = ()) -> Found:
    """Choose the files of a Hugging Face folder to copy with the model, ignoring the model's ``weights``."""
    carried: list[Path] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path in weights:
            continue
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if all(_goes_along(file, folder) for file in files):
            carried += [file.relative_to(folder) for file in files]
        else:
            left_out.append(f"{path.name}{'/' * path.is_dir()}")
    if (more := len(left_out) - NAMED) > 0:
        left_out[NAMED:] = [f"{more} more"]
    return Found(carried, left_out)


def _goes_along(path: Path, folder: Path) -> bool:
    """Whether a file in ``folder``, or in a folder there, is copied."""

    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(str(path.relative_to(folder)).lower(), one) for one in patterns)

    wanted = matches(COPIED_FOLDERS) if path.parent != folder else matches(COPIED) and not matches(NOT_COPIED)
    return wanted and path.is_file() and path.stat().st_size <= LARGEST


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that transformers loads."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def copy(source: Path, files: Iterable[Path], target: Path, *, link: bool = False) -> None:
    """Copy ``files`` of ``source`` to the same places in ``target``; with ``link``, as hard links."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if link:
            with contextlib.suppress(OSError):  # another disk, or one without links
                os.link((source / file).resolve(), target / file)
                continue
        shutil.copyfile(source / file, target / file)


def hand_on(place: Path, root: Path) -> None:
    """Link the files of ``place``, a folder or one file, into checkpoint ``root``, over existing ones."""
    files = look(place).carried if place.is_dir() else [Path(place.name)]
    source = place if place.is_dir() else place.parent
    target = root / FOLDER
    if not files or (target.is_dir() and target.samefile(source)):
        return
    for file in files:
        (target / file).unlink(missing_ok=True)
    copy(source, files, target, link=True)


def tokens(folder: Path) -> dict[str, str]:
    """What a tokenizer makes of text, by place: ``token 5``, ``merge 7``; {} without a file to read."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        if (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_bytes())
            vocabulary, merges = content["model"]["vocab"], content["model"].get("merges") or []
            if not isinstance(vocabulary, dict):  # of a unigram model: tokens with their scores
                vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
            added = {one["content"]: one["id"] for one in content.get("added_tokens") or []}
        else:
            vocabulary, added = json.loads((folder / "vocab.json").read_bytes()), {}
            merges = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [one if isinstance(one, str) else " ".join(one) for one in merges]
        found |= {f"token {number}": token for token, number in (vocabulary | added).items()}
        found |= {f"merge {number}": merge for number, merge in enumerate(merges)}
    for path in folder.glob("*.model"):
        found[path.name] = sha256(path)
    return found


def tokenizer_of(folder: Path) -> tuple[str, Path] | None:
    """Megatron's ``--tokenizer-type`` and ``--tokenizer-model`` for the tokenizer in ``folder``, if any."""
    if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]):
        return "HuggingFaceTokenizer", folder
    models = sorted(folder.glob("*.model")) if folder.is_dir() else []
    if len(models) == 1 and not (folder / "tokenizer_config.json").is_file():
        return "SentencePieceTokenizer", models[0]
    return ("HuggingFaceTokenizer", folder) if models else None
