"""YAML files with inheritance (``base:``) and nothing but plain values."""

from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.errors import UserError, reason


def read_yaml(path: str | Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A configuration's entries, over those of its ``base:`` files (a name or a list, later ones win)."""
    current = Path(path)
    try:
        if current.resolve() in (seen.resolve() for seen in _above):
            raise UserError(f"{current}: builds on itself through 'base:'")
        entries = yaml.safe_load(current.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {current}: no such file") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{current}: not readable as YAML ({reason(error)})") from None
    if not isinstance(entries, dict | None):
        raise UserError(f"{current}: must be a mapping of argument names to values")
    # As attributes: a name may be written with hyphens, as the flag is.
    entries = {str(name).replace("-", "_"): value for name, value in (entries or {}).items()}
    tokenizer = entries.get("tokenizer_model")  # relative to the file, as import-hf writes it
    if isinstance(tokenizer, str) and (current.parent / tokenizer).exists():
        entries["tokenizer_model"] = str(current.parent / tokenizer)
    base = entries.pop("base", None) or []
    section = entries.pop("upcycling", None) or {}
    bases = base if isinstance(base, list) else [base]
    if not isinstance(section, dict) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{current}: 'upcycling:' must be a mapping, and 'base:' one file name or a list")
    merged: dict[str, Any] = {"upcycling": {}}
    for name in bases:
        below = read_yaml(current.parent / name, (*_above, current))
        merged |= below | {"upcycling": merged["upcycling"] | below["upcycling"]}
    return merged | entries | {"upcycling": merged["upcycling"] | section}
