"""YAML files and flags into Megatron's arguments.

A configuration's entries are Megatron's own argument names (``num_layers: 24`` is ``--num-layers 24``;
``swiglu: true`` is ``--swiglu``), an optional ``base:`` that names one or more files to build on, and an
``upcycling:`` section with this package's options. What a checkpoint's manifest records stands below the
YAML file, and a flag stands above both. An unknown name is an error.

Pure but for the parser that is handed in: imports neither torch nor Megatron.
"""

import argparse
import difflib
import reprlib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config import start
from megatron_router_upcycling.config.expert_layers import layer_frequency
from megatron_router_upcycling.config.router import GROUPINGS, POOLINGS
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.kinds import KINDS

# Megatron argument -> the RouterConfig field that it sets.
SHARED_WITH_MEGATRON = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_pre_softmax": "pre_softmax",
}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add this package's flags to Megatron's parser; the ``upcycling:`` section takes the same names."""
    group = parser.add_argument_group(title="router upcycling")
    group.add_argument("--config", metavar="YAML", help="configuration to start from")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)"
    )
    group.add_argument("--router", choices=KINDS, help="kind of router")
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
    if frequency := parser._option_string_actions.get("--moe-layer-freq"):
        frequency.type = layer_frequency  # Megatron's own evaluates the text, however much it asks for
    return parser


def positive(text: str) -> float:
    """A flag's number that must be more than 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return number


OF_ROUTER = ("router", "num_routers", "pooling", "grouping", "locality_loss_coeff")
SECTION = (*OF_ROUTER, "collect_iters", "key_source", "router_samples", *start.NAMES)


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
    return {name: value for name, value in section.items() if name not in start.NAMES}


def read_start(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name in start.NAMES}
