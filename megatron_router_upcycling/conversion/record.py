"""What a conversion records of itself: the manifest, and digests of the files beside it."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.names import LEFT_OUT, TRAINING_STATE
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.job import Conversion
from megatron_router_upcycling.conversion.moe_arguments import model_flags
from megatron_router_upcycling.conversion.steps import LeaveOut
from megatron_router_upcycling.files import sha256, versions

DATA_FILES = "__upcycled_"  # begins the new data files' names, beside the dense checkpoint's own
EXPERT_FILE = f"{DATA_FILES}0.distcp"


def make_manifest(conversion: Conversion, folder: Path, contents: dict[str, str]) -> dict[str, Any]:
    """The record of a conversion; ``contents`` are the digests of the data files' chunks."""
    dense, options, stats = conversion.dense, conversion.options, conversion.stats
    left_out = Counter(
        found["kind"]
        for step in conversion.plan.steps
        for key in (step.keys if isinstance(step, LeaveOut) else ())
        if (found := TRAINING_STATE.match(key))
    )
    record = {
        "format": manifest.FORMAT,
        "router": options.router.to_dict(),
        "init": options.init.to_dict(),
        "model": conversion.model.flags
        | model_flags(conversion.model, options.router, options.shared_expert, conversion.plan.layers),
        "seed": options.seed,
        "shared_storage": not options.materialize,
        "source": {
            "path": str(dense.root.absolute()),
            "iteration": dense.iteration_dir.name,
            "digest": dense.digest(),
        },
        "key_stats": None,
        "files": {str(path.relative_to(folder)): _file_record(path, contents) for path in new_files(folder)},
        "linked": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "content": contents[path.name]}
            for path in linked_files(folder)
        },
        "left_out": {kind: {"entries": left_out[kind], "reason": LEFT_OUT[kind]} for kind in left_out},
        "versions": versions(),
    }
    if stats is not None and options.key_stats is not None:
        record["key_stats"] = {
            "path": str(options.key_stats.absolute()),
            "sha256": sha256(options.key_stats),
            "metadata": stats.metadata,
        }
    return record


def new_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that the dense one does not share."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.stat().st_nlink == 1)


def linked_files(folder: Path) -> list[Path]:
    """The data files of a checkpoint that are the dense one's as well."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1)


def _file_record(path: Path, contents: dict[str, str]) -> dict[str, Any]:
    """Size and SHA-256; for the experts, whose values keep the checksums they had, a digest of those."""
    digest = {"content": contents[path.name]} if path.name == EXPERT_FILE else {"sha256": sha256(path)}
    return {"bytes": path.stat().st_size} | digest
