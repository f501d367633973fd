"""The record that a converted checkpoint carries: ``router_upcycling.json`` in its root.

JSON, so that reading it runs no code. ``pretrain`` and ``layer_spec`` take a checkpoint's router
options from it, and write it anew beside the checkpoints that training saves.
"""

import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.routers.config import RouterConfig

NAME = "router_upcycling.json"
FORMAT = 1
MOST_NESTED = 20  # lists and mappings; a manifest nests four


def read(root: str | Path) -> dict[str, Any] | None:
    """The manifest in checkpoint root ``root``, or None where there is none."""
    path = Path(root) / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({reason(error)}); convert the model again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or _nests(manifest) > MOST_NESTED:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; convert the model again")
    return manifest


def _nests(value: Any) -> int:
    """How deep lists and mappings of JSON nest."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
    return depth


def router_config(manifest: dict[str, Any], source: str | Path) -> RouterConfig:
    """The router options that ``manifest`` records; ``source`` is named in errors."""
    router = manifest.get("router")
    if not isinstance(router, dict):
        raise UserError(f"{source}: has no 'router' section; convert the model again")
    return RouterConfig.from_dict(router, str(source))


def init_config(manifest: dict[str, Any], source: str | Path) -> InitConfig:
    """How the checkpoint was made to start; the paper's way where ``manifest`` says nothing."""
    init = manifest.get("init", {})
    if not isinstance(init, dict):
        raise UserError(f"{source}: its 'init' section is no mapping; convert the model again")
    return InitConfig.from_dict(init, str(source))


def write(root: str | Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` to ``root``, whole or not at all."""
    write_whole(Path(root) / NAME, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
