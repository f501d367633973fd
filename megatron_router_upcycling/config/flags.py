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
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.expert_layers import layer_frequency
from megatron_router_upcycling.routers.config import GROUPINGS, POOLINGS
from megatron_router_upcycling.routers.kinds import KINDS

# Megatron argument -> the RouterConfig field that it sets.
SHARED_WITH_MEGATRON = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_pre_softmax": "pre_softmax",
}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add this package's flags to Megatron's parser; the ``upcycling:`` section takes the same names."""
    run = parser.add_argument_group(title="configuration")
    run.add_argument("--config", metavar="YAML", help="file of flags' values; flags given beside it win")
    run.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)"
    )
    run.add_argument("--output", metavar="FILE", help="where collect_keys, and a rehearsal its JSON, write")
    _add_router(parser.add_argument_group(title="router (a converted checkpoint brings its own)"))
    _add_key_statistics(parser.add_argument_group(title="key statistics (collect_keys)"))
    _add_diagnostics(parser.add_argument_group(title="routing diagnostics"))
    _add_rehearsal(parser.add_argument_group(title="rehearsal (rehearse, or pretrain --rehearse N)"))
    if frequency := parser._option_string_actions.get("--moe-layer-freq"):
        frequency.type = layer_frequency  # Megatron's own evaluates the text, however much it asks for
    return parser


def _add_router(group: Any) -> None:
    group.add_argument("--router", choices=KINDS, help="kind of router")
    group.add_argument(
        "--top-k", dest="moe_router_topk", type=int, default=argparse.SUPPRESS, help="is --moe-router-topk"
    )
    group.add_argument("--num-routers", type=int, help="routers in the mixture (default: one an expert)")
    group.add_argument("--pooling", choices=POOLINGS, help="how the mixture's scores combine")
    group.add_argument("--grouping", choices=GROUPINGS, help="how attention heads are grouped")
    group.add_argument("--locality-loss-coeff", type=float, help="of --router locmoe (default: 0.01)")
    group.add_argument(
        "--no-moe-router-pre-softmax",
        dest="moe_router_pre_softmax",
        action="store_false",
        default=False,
        help="choose experts first, then take the softmax over them alone",
    )


def _add_key_statistics(group: Any) -> None:
    group.add_argument(
        "--collect-iters", metavar="N", type=int, default=10, help="batches to average over (default: 10)"
    )
    group.add_argument(
        "--router-samples",
        metavar="N",
        type=int,
        default=512,
        help="tokens whose hidden states to keep (default: 512)",
    )
    group.add_argument(
        "--key-source",
        choices=("pre_rope", "post_rope"),
        default="pre_rope",
        help="keys before or after the rotary embedding (default: pre_rope)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_diagnostics(group: Any) -> None:
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


def _add_rehearsal(group: Any) -> None:
    group.add_argument(
        "--gpus",
        "--rehearse",
        dest="rehearse",
        metavar="N",
        type=int,
        help="the GPUs of the run, of which one runs one step here, alone",
    )
    group.add_argument(
        "--rehearse-rank", metavar="R", type=int, default=0, help="which of them, from 0 (default: 0)"
    )
    group.add_argument(
        "--rehearse-seq-length",
        metavar="TOKENS",
        type=int,
        help="of the step (default: as configured; on the CPU so many that a micro-batch has 256)",
    )
    group.add_argument("--gpu-memory-gib", metavar="GIB", type=positive, default=80, help="(default: 80)")
    group.add_argument(
        "--peak-tflops", metavar="TFLOPS", type=positive, default=989, help="of one GPU (default: 989)"
    )


def positive(text: str) -> float:
    """A flag's number that must be more than 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return number


OF_ROUTER = ("router", "num_routers", "pooling", "grouping", "locality_loss_coeff")
SECTION = (*OF_ROUTER, "collect_iters", "key_source", "router_samples", *start.NAMES)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def options(parser: ArgumentParser) -> dict[str, tuple[str, argparse.Action]]:
    """The parser's flags by their names in a YAML file: ``num_layers`` -> (``--num-layers``, its action)."""
    return {
        flag.lstrip("-").replace("-", "_"): (flag, action)
        for flag, action in parser._option_string_actions.items()
    }


def set_defaults(parser: ArgumentParser, entries: dict[str, Any], source: str | Path) -> list[str]:
    """Let ``entries`` (argument name -> value) stand as the parser's defaults; return their attributes.

    Defaults, and not flags put before the user's: ``false`` must undo a switch that a manifest or a ``base:``
    file sets, and ``null`` a value, for which there are no flags.

    Raises:
        UserError: a name the parser does not know (the nearest one is suggested) or a value it refuses.
    """
    known = options(parser)
    values = {}
    for name, value in entries.items():
        key = str(name).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown argument {name!r}{hint}")
        flag, action = known[key]
        where = f"{source}: {key}: {reprlib.repr(value)}"
        values[action.dest] = None if value is None else _parsed(flag, action, value, where)
    parser.set_defaults(**values)
    return list(values)


def _parsed(flag: str, action: argparse.Action, value: Any, where: str) -> Any:
    """``value`` from YAML as ``action`` parses it from the command line; ``where`` begins an error."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} is a switch; write true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value != flag.startswith("--no-")
        if isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction):
            return action.const if value else not action.const
        return action.const if value else action.default
    if isinstance(action.nargs, int) or action.nargs in ("+", "*"):
        return [_parsed_item(action, item, where) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise UserError(f"{where} takes one value, not a list")
    return _parsed_item(action, value, where)


def _parsed_item(action: argparse.Action, item: Any, where: str) -> Any:
    kind = action.type if callable(action.type) else str
    try:
        if isinstance(item, list | dict | set):
            raise TypeError
        converted = kind(str(item))
    except (TypeError, ValueError, KeyError, argparse.ArgumentTypeError):
        raise UserError(f"{where} is not a valid {getattr(kind, '__name__', kind)}") from None
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{where}: choose one of {', '.join(map(str, action.choices))}")
    return converted


def section_defaults(section: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Check an ``upcycling:`` section's names; those of its entries that stand as flags' defaults."""
    for name in section:
        if name not in SECTION:
            raise UserError(f"{source}: unknown upcycling option {name!r}; known: {', '.join(SECTION)}")
    return {name: value for name, value in section.items() if name not in start.NAMES}


def read_start(section: dict[str, Any]) -> dict[str, Any]:
    """Those of an ``upcycling:`` section's entries that say how the model starts (``InitConfig``)."""
    return {name: value for name, value in section.items() if name in start.NAMES}
