"""YAML files and flags into Megatron's arguments.

A configuration's entries are Megatron's own argument names (``num_layers: 24`` is ``--num-layers 24``;
``swiglu: true`` is ``--swiglu``), an optional ``base:`` that names one or more files to build on, and an
``upcycling:`` section with this package's options. What a checkpoint's manifest records stands below the
YAML file, and a flag stands above both. An unknown name is an error.

Pure but for the parser that is handed in: imports neither torch nor Megatron.
"""

import argparse
import dataclasses
import difflib
import reprlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling import init_config, manifest
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.init_config import InitConfig
from megatron_router_upcycling.router_config import GROUPINGS, POOLINGS, ROUTERS, RouterConfig, check_types

# Megatron argument -> the RouterConfig field that it sets.
SHARED_WITH_MEGATRON = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_pre_softmax": "pre_softmax",
}


def read_yaml(path: str | Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The entries of a configuration, with the ``base:`` files (a name or a list, later ones win) beneath it.

    Raises:
        UserError: a file that is missing or is not a YAML mapping, or one that builds on itself.
    """
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
    base = entries.pop("base", None) or []
    section = entries.pop("upcycling", None) or {}
    if not isinstance(section, dict):
        raise UserError(f"{current}: 'upcycling:' must be a mapping")
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{current}: 'base:' must be the name of a file, or a list of names")
    merged: dict[str, Any] = {"upcycling": {}}
    for layer in (*(read_yaml(current.parent / name, (*_above, current)) for name in bases), entries):
        merged |= layer | {"upcycling": merged["upcycling"] | layer.get("upcycling", {})}
    merged["upcycling"] |= section
    return merged


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add this package's flags to Megatron's parser; the ``upcycling:`` section takes the same names."""
    group = parser.add_argument_group(title="router upcycling")
    group.add_argument("--config", metavar="YAML", help="configuration to start from")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)"
    )
    group.add_argument("--router", choices=ROUTERS, help="kind of router")
    group.add_argument("--num-routers", type=int, help="routers in the mixture (default: one an expert)")
    group.add_argument("--pooling", choices=POOLINGS, help="how the mixture's scores combine")
    group.add_argument("--grouping", choices=GROUPINGS, help="how attention heads are grouped")
    group.add_argument("--locality-loss-coeff", type=float, help="of --router locmoe (default: 0.01)")
    group.add_argument("--collect-iters", type=int, default=10, help="batches to average keys over")
    group.add_argument(
        "--router-samples", type=int, default=512, help="tokens whose hidden states to keep (default: 512)"
    )
    group.add_argument("--key-source", choices=("pre_rope", "post_rope"), default="pre_rope")
    group.add_argument("--output", metavar="FILE", help="where collect_keys, and a rehearsal its JSON, write")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument(
        "--routing-diagnostics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="statistics of an MoE's routers: to SAVE/routing.jsonl, TensorBoard and W&B (default: on)",
    )
    group.add_argument(
        "--routing-diagnostics-interval",
        metavar="N",
        type=int,
        help="iterations between two of them (default: --log-interval)",
    )
    rehearsal = parser.add_argument_group(title="rehearsal")
    rehearsal.add_argument(
        "--rehearse", metavar="WORLD_SIZE", type=int, help="run one rank of so many for one step, alone"
    )
    rehearsal.add_argument("--rehearse-rank", metavar="R", type=int, default=0, help="(default: 0)")
    rehearsal.add_argument(
        "--rehearse-seq-length",
        metavar="TOKENS",
        type=int,
        help="of the step (default: as configured; on the CPU so many that a micro-batch has 256)",
    )
    rehearsal.add_argument("--gpu-memory-gib", metavar="GIB", type=positive, default=80, help="(default: 80)")
    rehearsal.add_argument("--peak-tflops", type=positive, default=989, help="of one GPU (default: 989)")
    parser.add_argument(
        "--no-moe-router-pre-softmax", dest="moe_router_pre_softmax", action="store_false", default=None
    )
    parser.set_defaults(moe_router_pre_softmax=False)
    return parser


def positive(text: str) -> float:
    """A flag's number that must be more than 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return number


OF_ROUTER = ("router", "num_routers", "pooling", "grouping", "locality_loss_coeff")
SECTION = (*OF_ROUTER, "collect_iters", "key_source", "router_samples", *init_config.NAMES)


def set_defaults(parser: ArgumentParser, entries: dict[str, Any], source: str | Path) -> list[str]:
    """Let ``entries`` (argument name -> value) stand as the parser's defaults; return their attributes.

    Raises:
        UserError: a name the parser does not know (the nearest one is suggested) or a value it refuses.
    """
    options = {
        string.lstrip("-").replace("-", "_"): (action, string)
        for string, action in parser._option_string_actions.items()
    }
    attributes = []
    for name, value in entries.items():
        key = str(name).replace("-", "_")
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown argument {name!r}{hint}")
        action, string = options[key]
        parser.set_defaults(**{action.dest: _convert(action, string, value, source)})
        attributes.append(action.dest)
    return attributes


def _convert(action: argparse.Action, string: str, value: Any, source: str | Path) -> Any:
    """``value`` from YAML as ``action`` would have parsed it from the command line."""
    if value is None:
        return None
    where = f"{source}: {string.lstrip('-').replace('-', '_')}: {reprlib.repr(value)}"
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{where} is a switch; write true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value != string.startswith("--no-")
        if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
            return action.const if value else not action.const
        return action.const if value else action.default
    many = isinstance(action.nargs, int) or action.nargs in ("+", "*")
    if many != isinstance(value, list):
        if not many:
            raise UserError(f"{where} takes one value, not a list")
        value = [value]
    kind = action.type if callable(action.type) else str

    def one(item: Any) -> Any:
        try:
            if isinstance(item, list | dict | set):
                raise TypeError
            converted = kind(str(item))
        except (TypeError, ValueError, KeyError, argparse.ArgumentTypeError):
            name = getattr(kind, "__name__", str(kind))
            raise UserError(f"{where} is not a valid {name}") from None
        if action.choices is not None and converted not in action.choices:
            raise UserError(f"{where}: choose one of {', '.join(map(str, action.choices))}")
        return converted

    return [one(item) for item in value] if many else one(value)


def section_defaults(section: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Check an ``upcycling:`` section's names; those of its entries that stand as flags' defaults."""
    for name in section:
        if name not in SECTION:
            raise UserError(f"{source}: unknown upcycling option {name!r}; known: {', '.join(SECTION)}")
    return {name: value for name, value in section.items() if name not in init_config.NAMES}


def _start(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name in init_config.NAMES}


def check_start(section: dict[str, Any], recorded: dict[str, Any] | None, source: str | Path | None) -> None:
    """Compare what an ``upcycling:`` section says of the start with how ``recorded`` (a manifest) was made.

    Raises:
        UserError: they differ, so that another model would be trained than the file describes.
    """
    if recorded is None:
        return
    made = manifest.init_config(recorded, str(source)).to_dict()
    for name, value in _start(section).items():
        if made[name] != value:
            raise UserError(
                f"--config: {name} {value}, but {source} was converted with {made[name]}; convert again with"
                " this file as --config"
            )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a YAML file says of a conversion; ``router`` has the fields of RouterConfig that it gives."""

    router: dict[str, Any]
    init: InitConfig
    key_source: str | None


def read_conversion(path: str | Path | None) -> Conversion:
    """What ``convert --config`` takes from the file that ``pretrain --config`` will be given.

    Raises:
        UserError: an entry of the ``upcycling:`` section that does not exist or cannot have its value.
    """
    entries = read_yaml(path) if path else {"upcycling": {}}
    flags = section_defaults(entries["upcycling"], str(path))
    router = {name: value for name, value in flags.items() if name in OF_ROUTER and value is not None}
    for name, field in SHARED_WITH_MEGATRON.items():
        if entries.get(name) is not None:
            router[field] = entries[name]
    check_types(RouterConfig, router, f"{path}: option")
    return Conversion(
        router, InitConfig.from_dict(_start(entries["upcycling"]), str(path)), flags.get("key_source")
    )


def router_config(
    args: Namespace, recorded: RouterConfig | None, source: str | Path | None
) -> RouterConfig | None:
    """The router that a run trains: what its checkpoint records, with what flags and YAML change.

    Args:
        args: Megatron's parsed arguments with this package's.
        recorded: the router in the checkpoint's manifest, found in ``source``; None without one.

    Returns:
        None for a dense model.

    Raises:
        UserError: a flag contradicts the checkpoint in what its parameters depend on.
    """
    if args.num_experts is None:
        return None
    asked = {name: getattr(args, name) for name in OF_ROUTER}
    asked = {name: value for name, value in asked.items() if value is not None}
    asked |= {field: getattr(args, name) for name, field in SHARED_WITH_MEGATRON.items()}
    if recorded is None:
        return RouterConfig(**{"router": "linear"} | asked)
    for name in ("router", "num_experts", "num_routers"):
        if name in asked and asked[name] != getattr(recorded, name):
            raise UserError(
                f"--{name.replace('_', '-')} {asked[name]}: {source} was converted with"
                f" {getattr(recorded, name)}; leave the flag out or convert again"
            )
    return dataclasses.replace(recorded, **asked)


def check_architecture(
    parser: ArgumentParser, args: Namespace, model: dict[str, Any], source: str | Path
) -> None:
    """Compare the arguments with the architecture that a checkpoint records.

    Raises:
        UserError: names the first argument that differs and what the checkpoint has.
    """
    for attribute in set_defaults(parser, model, source):
        expected, found = parser.get_default(attribute), getattr(args, attribute)
        if found != expected:
            raise UserError(
                f"--{attribute.replace('_', '-')} {found}: the checkpoint {source} has {expected};"
                " leave it out of the flags and the YAML file"
            )


def find_manifest(roots: Iterable[str | None]) -> tuple[dict[str, Any] | None, str | None]:
    """The first manifest in checkpoint roots, and where it was found."""
    for root in roots:
        if root and (found := manifest.read(root)) is not None:
            return found, root
    return None, None
