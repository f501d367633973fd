"""The record in a converted checkpoint's root, which training keeps: ``router_upcycling.json``."""

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
        depth = _depth(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({reason(error)}); convert the model again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or depth > MOST_NESTED:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; convert the model again")
    return manifest


def _depth(value: Any) -> int:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, held), default=0)


def router_config(manifest: dict[str, Any], source: str | Path) -> RouterConfig:
    """The router options that ``manifest`` records; errors name ``source``."""
    return RouterConfig.from_dict(manifest.get("router"), f"{source}: router")


def init_config(manifest: dict[str, Any], source: str | Path) -> InitConfig:
    """How the checkpoint's routers were made; the paper's way where ``manifest`` has nothing."""
    return InitConfig.from_dict(manifest.get("init", {}), f"{source}: init")


def write(root: str | Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` to ``root``, whole or not at all."""
    write_whole(Path(root) / NAME, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
