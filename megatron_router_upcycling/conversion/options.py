"""The options of a conversion, from flags and from a YAML file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.flags import OF_ROUTER, SHARED_WITH_MEGATRON, split_section
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig

RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6})(?::(\d{1,6}))?)?")


@dataclass(frozen=True)
class Options:
    """The user's options, without the two folders."""

    router: RouterConfig
    key_stats: tuple[Path, ...] = ()  # of several texts: one a model of ``experts``, or one a copy in turn
    seed: int = 1234
    materialize: bool = False
    overwrite: bool = False
    experts: tuple[Path, ...] = ()  # dense models whose FFNs the experts are, in turn; (): DENSE
    average_rest: bool = False  # all that is no expert is the mean of ``experts``, not DENSE's
    shared_expert: bool = False
    layers: str | None = None  # those that get experts, as ``parse_layers`` reads them; None: all
    init: InitConfig = InitConfig()
    config: Path | None = None  # a YAML file that describes the dense model, where its checkpoint does not
    megatron: Mapping[str, Any] = field(default_factory=dict)  # training's flags, where known


@dataclass(frozen=True)
class Method:
    """A conversion's options in a YAML file; ``router`` has the fields of RouterConfig that it sets."""

    router: dict[str, Any]
    init: InitConfig
    megatron: dict[str, Any]  # Megatron's flags in the file


def read_method(path: str | Path | None) -> Method:
    """Read what ``convert --config`` needs from the file that is later given to ``pretrain --config``."""
    entries = read_yaml(path) if path else {"upcycling": {}}
    flags, start = split_section(entries.pop("upcycling"), str(path))
    given = {name: flags.get(name) for name in OF_ROUTER}
    given |= {option: entries.get(name) for name, option in SHARED_WITH_MEGATRON.items()}
    router = {name: value for name, value in given.items() if value is not None}
    RouterConfig.check_values(router, str(path))
    return Method(router, InitConfig.from_dict(start, str(path)), entries)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...] | None:
    """The layers that ``--layers`` names, None for all: numbers and ranges with an optional step.

    ``1,3,5-7`` are the layers 1, 3, 5, 6, 7, counted from 0; ``1-23:2`` is every other layer from 1 on.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if not match:
            raise UserError(f"--layers {text!r}: write layers as in 1,3,5-7 or 1-{num_layers - 1}:2")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise UserError(f"--layers {part.strip()}: the model has the layers 0 to {num_layers - 1}")
        chosen.update(range(first, last + 1, max(1, int(match[3] or 1))))
    return None if len(chosen) == num_layers else tuple(sorted(chosen))
