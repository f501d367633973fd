"""Files of a Hugging Face folder beside its weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.errors import UserError

if TYPE_CHECKING:
    from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint

GENERATION_CONFIG = "generation_config.json"

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MODELLING_FILE = "modeling_upcycled_qwen_moe.py"
CONFIG = "config.json"
LFS_POINTER = b"version https://git-lfs"
HEADER_BYTES = 1 << 20  # of a safetensors file, which begins with the names of its tensors
CARD = "README.md"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Of what stands beside the weights, what an exported folder has of its own.
OWN_FILES = (CONFIG, CARD, "export_hf.json")


def find_beside(asked: Path | None, checkpoint: "Checkpoint") -> Path | None:
    """The folder of the tokenizer and what else goes with it.

    The one asked for, the one beside the checkpoint, the one that training used, or none.
    """
    if asked is not None:
        if not beside.is_tokenizer(asked):
            raise UserError(f"--tokenizer {asked}: holds none of {', '.join(beside.TOKENIZER_FILES)}")
        return asked
    own, used = checkpoint.root / beside.FOLDER, getattr(checkpoint.args, "tokenizer_model", None)
    if getattr(checkpoint.args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        used = None
    folders = [folder for folder in (own, used and Path(used)) if folder and folder.is_dir()]
    return next(filter(beside.is_tokenizer, folders), next(iter(folders), None))


def shard_name(number: int, count: int) -> str:
    """The name of a file of weights, counted from 1."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def copy_beside(source: Path, target: Path) -> dict[str, Any]:
    """Copy what stands beside the weights; return the ids of special tokens as config.json has them."""
    files = beside.look(source).carried
    beside.copy(source, tuple(file for file in files if str(file) not in OWN_FILES), target)
    for file in (CONFIG, GENERATION_CONFIG):
        if (source / file).is_file():
            found = read_json(source / file)
            return {name: found[name] for name in SPECIAL_TOKENS if found.get(name) is not None}
    return {}


def refuse_other_folders(folder: Path, flag: str) -> None:
    """Refuse ``folder``, which ``flag`` gave, by what it is where it is not a model's in safetensors."""
    refuse_adapter(folder, flag)
    where, names = f"{flag} {folder}", sorted(path.name for path in folder.iterdir())
    if CONFIG not in names and (snapshots := sorted((folder / "snapshots").glob("*"))):
        raise UserError(f"{where}: a model's folder in the hub's cache; name {snapshots[-1]}")
    for name in names:
        if name.endswith(".gguf") and not any(other.endswith(".safetensors") for other in names):
            raise UserError(f"{where}: holds GGUF ({name}); take the model in safetensors")
        if name in ("quantize_config.json", "quant_config.json") and not _has_plain_weights(folder):
            raise UserError(f"{where}: quantised weights ({name}); name the folder of the unquantised model")
        path = folder / name
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{path}: a Git LFS pointer in place of the file; run git lfs pull in {folder}")


def _has_plain_weights(folder: Path) -> bool:
    """Whether the weights are in safetensors and not packed, as GPTQ and AWQ pack them beside such a file."""
    headers = []
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            headers.append(file.read(HEADER_BYTES))
    return bool(headers) and not any(b".qweight" in header for header in headers)


def refuse_adapter(folder: Path, flag: str) -> None:
    """Refuse a folder that holds an adapter and no model."""
    weights = [path for name in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(name)]
    if (folder / beside.ADAPTER).is_file() and not (weights and (folder / CONFIG).is_file()):
        raise UserError(
            f"{flag} {folder}: holds an adapter ({beside.ADAPTER}) and no model; merge it into its base model"
            " (peft: merge_and_unload(), then save_pretrained) and name that folder"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a Hugging Face folder") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, or cut short; download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content
