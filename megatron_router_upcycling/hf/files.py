"""The file names of a Hugging Face folder, and the refusal of folders that hold no model."""

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.errors import UserError, os_error_as

CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
MODELLING_FILE = "modeling_upcycled_qwen_moe.py"
SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file of weights, or several

LFS_POINTER = b"version https://git-lfs"
# File that identifies a folder without a whole model -> what the folder holds, and what to name instead.
OTHER_KINDS = {
    beside.ADAPTER: "an adapter: merge it into its base model (peft: merge_and_unload()) and name that",
    "*.gguf": "a model in GGUF: name the folder of the same in safetensors",
    "quant*_config.json": "a quantised model (GPTQ, AWQ): name the folder of the unquantised one",
    "snapshots/*": "the hub's cache: name {found}",
}


def numbered(number: int, count: int) -> str:
    """The name of one of several files of weights, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def refuse_other_folders(folder: Path, flag: str) -> None:
    """Refuse the folder that ``flag`` names if it holds no model, with what it holds instead."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; name the folder of a model's {CONFIG}")
    weights = [path for name in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(name)]
    if not (weights and (folder / CONFIG).is_file()) and (other := what_else(folder)):
        raise UserError(f"{flag} {folder}: holds no model{other}")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{path}: a Git LFS pointer in place of the file; run git lfs pull in {folder}")


def what_else(folder: Path) -> str:
    """What a folder without a whole model may be, as the end of a message; "" if unknown."""
    for pattern, kind in OTHER_KINDS.items():
        for found in sorted(folder.glob(pattern), reverse=True):
            return f"; {found.name} is of {kind.format(found=found)}"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    content = None
    read = os_error_as(f"{path}: cannot be read", "; name a Hugging Face folder")
    with read, contextlib.suppress(ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object, or cut short; download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
