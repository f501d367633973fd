"""Open a torch_dist or legacy checkpoint, or a dense model's, and refuse an incomplete one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.format.files import BACKEND, CONFIG, locate, read_record
from megatron_router_upcycling.checkpoint.format.metadata import METADATA, Report, parse_metadata
from megatron_router_upcycling.checkpoint.layers import stack_layers
from megatron_router_upcycling.checkpoint.legacy import LegacyCheckpoint
from megatron_router_upcycling.checkpoint.names import holds_experts
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, shown


def open_dense(root: str | Path, config: Path | None = None) -> Checkpoint:
    """Open a dense model's checkpoint of either format, layers stacked; ``config`` as in ``Checkpoint``."""
    checkpoint = dataclasses.replace(open_checkpoint(root), config=config)
    return checkpoint if holds_experts(checkpoint.tensors) else stack_layers(checkpoint)


def open_checkpoint(root: str | Path, report: Report | None = None) -> Checkpoint:
    """Open the newest iteration of the checkpoint ``root``, or the iteration whose folder ``root`` is.

    ``report``: called with (tensor or file, fault), instead of raising, if it is incomplete or inconsistent.
    """
    root, folder = locate(Path(root))
    if _is_legacy(folder):
        return LegacyCheckpoint.open(root, folder)
    if (backend := _backend(folder)) != BACKEND:
        raise UserError(
            f"{folder / CONFIG}: format {shown(backend)!r}; save the checkpoint with --ckpt-format {BACKEND}"
        )
    return Checkpoint.open_folder(root, folder, report)


def names_experts(root: str | Path) -> bool:
    """Whether a torch_dist checkpoint's index names experts; its bytes are searched, nothing is parsed."""
    index = locate(Path(root))[1] / METADATA
    return index.is_file() and holds_experts([read_record(index).decode("latin-1")])


def check_whole(root: str | Path, step: int | None = None) -> None:
    """Refuse a checkpoint that training cannot load: missing, half-written, or saved by a later PyTorch.

    Reads a torch_dist checkpoint's metadata and file sizes, no values; Megatron's other formats pass.
    """
    folder = _folder(root, step)
    if not _is_legacy(folder) and _backend(folder) == BACKEND:
        tensors, objects = parse_metadata(read_record(folder / METADATA), folder / METADATA, to_train=True)
        Checkpoint(folder.parent, folder, tensors, objects, {}).check_files(None)


def format_of(root: str | Path, step: int | None = None) -> str | None:
    """The ``--ckpt-format`` of a checkpoint, by its files: torch_dist, torch, or None for another."""
    folder = _folder(root, step)
    if _is_legacy(folder):
        return "torch"
    return BACKEND if (folder / CONFIG).exists() and _backend(folder) == BACKEND else None


def _folder(root: str | Path, step: int | None) -> Path:
    return locate(Path(root))[1] if step is None else Path(root) / f"iter_{step:07d}"


def _is_legacy(folder: Path) -> bool:
    return not (folder / CONFIG).exists() and any(folder.glob("mp_rank_*"))


def _backend(folder: Path) -> Any:
    config = folder / CONFIG
    try:
        return json.loads(read_record(config)).get("sharded_backend")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{config}: not JSON; the checkpoint is incomplete") from None
