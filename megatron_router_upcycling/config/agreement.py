"""Whether a run's YAML file and flags agree with its checkpoint, so that the described model is trained."""

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.config.flags import OF_ROUTER, SHARED_WITH_MEGATRON, flag_of, set_defaults
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig


def check_start(start: dict[str, Any], recorded: dict[str, Any] | None, source: str | Path | None) -> None:
    """Compare a YAML file's values of ``InitConfig`` with those of the manifest found in ``source``."""
    made = start if recorded is None else manifest.init_config(recorded, str(source)).to_dict()
    for name, value in start.items():
        if made[name] != value:
            raise UserError(
                f"--config: {name} {value}, but {source} was converted with {made[name]}; convert again with"
                " this file as --config"
            )


def router_config(
    args: Namespace, recorded: RouterConfig | None, source: str | Path | None
) -> RouterConfig | None:
    """The router that a run trains, None for a dense model: the manifest's as flags and YAML change it."""
    if args.num_experts is None:
        return None
    asked = {name: getattr(args, name) for name in OF_ROUTER if getattr(args, name) is not None}
    asked |= {field: getattr(args, name) for name, field in SHARED_WITH_MEGATRON.items()}
    if recorded is None:
        return RouterConfig(**{"router": "linear"} | asked)
    for name in ("router", "num_experts", "num_routers"):
        if name in asked and asked[name] != getattr(recorded, name):
            raise UserError(
                f"{flag_of(name)} {asked[name]}: {source} was converted with {getattr(recorded, name)};"
                " leave the flag out or convert again"
            )
    return dataclasses.replace(recorded, **asked)


def check_architecture(
    parser: ArgumentParser, args: Namespace, model: dict[str, Any], source: str | Path
) -> None:
    """Compare the arguments with the architecture that a checkpoint records."""
    for attribute in set_defaults(parser, model, source):
        expected, found = parser.get_default(attribute), getattr(args, attribute)
        if found != expected:
            raise UserError(
                f"{flag_of(attribute)} {found}: the checkpoint {source} has {expected};"
                " leave it out of the flags and the YAML file"
            )


def find_manifest(roots: Iterable[str | None]) -> tuple[dict[str, Any] | None, str | None]:
    """The first manifest in checkpoint roots, and its root."""
    for root in roots:
        if root and (found := manifest.read(root)) is not None:
            return found, root
    return None, None
