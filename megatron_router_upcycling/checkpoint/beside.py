"""What stands beside a model's weights: its tokenizer, chat templates, generation settings, licence.

Each checkpoint keeps these files in a folder of its own, ``ROOT/tokenizer``, linked to those of the one
before it. So nothing is lost when an earlier one is moved or removed. Pure: no torch.
"""

import fnmatch
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = "tokenizer"  # of a checkpoint's root
# A folder with one of these holds a tokenizer that transformers loads.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
SENTENCEPIECE = ".model"

# What is copied, by name without regard to case. Other files may change what a folder is to whoever loads it:
# those of an adapter, a quantisation, a trainer, another model.
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template.json", "config.json", "generation_config.json"),
    *("licen[sc]e*", "copying*", "notice*", "readme*", "*.md"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# Folders are copied whole or not at all: those of chat templates, and of sentence-transformers (1_Pooling).
COPIED_FOLDERS = ("*/*.jinja", "[0-9]_*/config.json")
ADAPTER = "adapter_config.json"
NOT_COPIED = {
    "of an adapter, which is no part of the model until it is merged": ("adapter_*",),
    "other weights": (
        *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
        "*.ckpt",
        *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.npz", "*.tflite"),
    ),
    "code": ("*.py", "*.pyc", "*.so"),
}
OTHER = "neither tokenizer, settings nor licence"
LARGEST = 256 << 20  # bytes; the largest tokenizers have 35 million
NAMED = 5  # of what is left out for one reason


@dataclass(frozen=True)
class Found:
    """The files of a folder but for its weights, by their paths in it, and what else there is."""

    carried: tuple[Path, ...]
    left_out: tuple[str, ...]  # as a sentence of what was left out has it: "NAME (why)"


def look(folder: Path, weights: Iterable[Path] = ()) -> Found:
    """What of ``folder``, a Hugging Face folder or one of ``hand_on``'s, goes where the model goes.

    Args:
        weights: files of the model's own weights, which are not named.
    """
    carried: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path in weights:
            continue
        if path.is_dir():
            files = sorted(file.relative_to(folder) for file in path.iterdir())
            whole = all((folder / file).is_file() and _matches(file, COPIED_FOLDERS) for file in files)
            why, name = ("" if whole else OTHER), f"{path.name}/"
        else:
            files, why, name = [Path(path.name)], _why_not(path), path.name
        if why:
            left_out.setdefault(why, []).append(name)
        else:
            carried += files
    return Found(tuple(carried), tuple(_sentence(names, why) for why, names in left_out.items()))


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(str(path).lower(), pattern) for pattern in patterns)


def _why_not(path: Path) -> str:
    """Why a file is left out; empty where it is not."""
    name = Path(path.name)
    for why, patterns in NOT_COPIED.items():
        if _matches(name, patterns):
            return why
    if not path.is_file() or not _matches(name, COPIED):
        return OTHER
    return "over 256 MiB" if path.stat().st_size > LARGEST else ""


def _sentence(names: list[str], why: str) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{' and '.join(names[:NAMED])}{more} ({why})"


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that transformers loads."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def copy(source: Path, files: tuple[Path, ...], target: Path, *, link: bool = False) -> None:
    """Copy ``files`` of ``source`` to the same places in ``target``; with ``link``, as other names of them.

    Raises:
        OSError: they cannot be read or written.
    """
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked((source / file).resolve(), target / file)):
            shutil.copyfile(source / file, target / file)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        return False
    return True


def hand_on(place: Path, root: Path) -> None:
    """Give the checkpoint in ``root`` what ``place`` holds: a folder, or one file (sentencepiece's model).

    What is there under the same name gives way.

    Raises:
        OSError: it cannot be written.
    """
    files = look(place).carried if place.is_dir() else (Path(place.name),)
    source = place if place.is_dir() else place.parent
    target = root / FOLDER
    if not files or (target.is_dir() and target.samefile(source)):
        return
    for file in files:
        (target / file).unlink(missing_ok=True)
    copy(source, files, target, link=True)


def tokenizer_in(root: Path) -> tuple[str, Path] | None:
    """Megatron's ``--tokenizer-type`` and ``--tokenizer-model`` for what stands in ``root``, if any."""
    return tokenizer_of(root / FOLDER)


def tokenizer_of(folder: Path) -> tuple[str, Path] | None:
    """The same for a folder of a tokenizer's files."""
    if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]):
        return "HuggingFaceTokenizer", folder
    models = sorted(folder.glob(f"*{SENTENCEPIECE}")) if folder.is_dir() else []
    if len(models) == 1 and not (folder / "tokenizer_config.json").is_file():
        return "SentencePieceTokenizer", models[0]
    return ("HuggingFaceTokenizer", folder) if models else None
