"""What a conversion records of itself: the manifest, and digests of the files beside it."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.names import LEFT_OUT, TRAINING_STATE
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.moe_arguments import model_flags
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.files import sha256, versions
from megatron_router_upcycling.key_statistics.file import KeyStats

DATA_FILES = "__upcycled_"  # begins the new data files' names, beside the dense checkpoint's own
EXPERT_FILE = f"{DATA_FILES}0.distcp"


def make_manifest(
    plan: Plan, stats: KeyStats | None, folder: Path, contents: dict[str, str]
) -> dict[str, Any]:
    """The record of a conversion; ``contents`` are the digests of the data files' chunks."""
    dense, model, options = plan.dense, plan.model, plan.options
    left_out = Counter(found["kind"] for found in map(TRAINING_STATE.match, plan.left_out) if found)
    files: dict[bool, dict[str, Any]] = {
        False: {},
        True: {},
    }  # by whether they are the dense checkpoint's too
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.stat().st_nlink > 1][str(path.relative_to(folder))] = _file_record(path, contents)
    record = {
        "format": manifest.FORMAT,
        "router": options.router.to_dict(),
        "init": options.init.to_dict(),
        "model": model.flags | model_flags(model, options, plan.layers),
        "seed": options.seed,
        "shared_storage": not options.materialize,
        "source": {
            "path": str(dense.root.absolute()),
            "iteration": dense.iteration_dir.name,
            "digest": dense.digest(),
        },
        "key_stats": None,
        "files": files[False],
        "linked": files[True],
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


def _file_record(path: Path, contents: dict[str, str]) -> dict[str, Any]:
    """Size and SHA-256; of linked files and the experts', whose values keep checksums, a digest of these."""
    if path.stat().st_nlink > 1 or path.name == EXPERT_FILE:
        digest = {"content": contents[path.name]}
    else:
        digest = {"sha256": sha256(path)}
    return {"bytes": path.stat().st_size} | digest
