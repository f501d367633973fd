"""The record in a converted checkpoint's root, which training keeps: ``router_upcycling.json``."""

import json
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.flags import SHARED_WITH_MEGATRON
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


def router_of(manifest: dict[str, Any] | None, args: Any, root: Path) -> RouterConfig:
    """The router of a checkpoint with arguments ``args``: without a manifest, Megatron's linear one."""
    trained = {field: getattr(args, name, None) for name, field in SHARED_WITH_MEGATRON.items()}
    trained["pre_softmax"] = bool(trained["pre_softmax"])
    if manifest is None:
        return RouterConfig.from_dict({"router": "linear"} | trained, f"{root}: its training arguments")
    router = router_config(manifest, root / NAME)
    for name, value in trained.items():
        if getattr(router, name) != value:
            raise UserError(
                f"{root / NAME}: {name} {getattr(router, name)}, but the model was trained with {value}; put"
                " the manifest of that training there"
            )
    return router


def init_config(manifest: dict[str, Any], source: str | Path) -> InitConfig:
    """How the checkpoint's routers were made; the paper's way where ``manifest`` has nothing."""
    return InitConfig.from_dict(manifest.get("init", {}), f"{source}: init")


def section(manifest: dict[str, Any], name: str, whose: str) -> dict[str, Any]:
    """A section that every manifest has; an error begins with ``whose``."""
    if not isinstance(found := manifest.get(name), dict):
        raise UserError(f"{whose} has no {name!r} section; convert the model again")
    return found


def entries(manifest: dict[str, Any], name: str, source: str | Path) -> list[dict[str, Any]]:
    """A section of which there may be several, one or none (null)."""
    found = manifest.get(name)
    found = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) for one in found):
        raise UserError(f"{source}: its manifest has no {name!r} section; convert the model again")
    return found


def write(root: str | Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` to ``root``, whole or not at all."""
    write_whole(Path(root) / NAME, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
