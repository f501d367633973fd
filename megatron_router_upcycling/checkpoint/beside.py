"""What stands beside a model's weights: its tokenizer, chat templates, generation settings, licence.

Each checkpoint keeps these files in a folder of its own, ``ROOT/tokenizer``, linked to those of the one
before it. So nothing is lost when an earlier one is moved or removed. Pure: no torch.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "tokenizer"  # of a checkpoint's root
# A folder with one of these holds a tokenizer that transformers loads.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
SENTENCEPIECE = ".model"

WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".npz", ".tflite", ".mlmodel"),
)
LARGEST = 256 << 20  # bytes; the largest tokenizers have 35 million


@dataclass(frozen=True)
class Found:
    """The files of a folder but for its weights, by their paths in it, and what else there is."""

    carried: tuple[Path, ...]
    left_out: tuple[str, ...]  # as a sentence of what was left out has it: "NAME (why)"


def look(folder: Path) -> Found:
    """What of ``folder``, a Hugging Face folder or one of ``link``'s, goes where the model goes."""
    carried, left_out = [], []
    for path in _files(folder):
        why = _why_not(path)
        if why is None:
            carried.append(path.relative_to(folder))
        elif why:
            left_out.append(f"{path.relative_to(folder)} ({why})")
    return Found(tuple(carried), tuple(left_out))


def _files(folder: Path) -> Iterator[Path]:
    """What is not hidden, in the order of names; folders that are links are not entered."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _why_not(path: Path) -> str | None:
    """Why a file is left out; empty where that need not be said."""
    name = path.name.lower()
    if name.endswith(WEIGHTS):
        return "" if name.endswith((".safetensors", ".safetensors.index.json")) else "other weights"
    if name.endswith((".py", ".pyc", ".so")):
        return "code"
    if not path.is_file():
        return "not a file"
    return "over 256 MiB" if path.stat().st_size > LARGEST else None


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
