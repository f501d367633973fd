"""This package's flags, and YAML files as defaults of flags.

An entry of a YAML file is one of Megatron's argument names (``num_layers: 24`` is ``--num-layers 24``;
``swiglu: true`` is ``--swiglu``), ``base:`` with one or more files to inherit from, or ``upcycling:`` with
this package's options. The YAML file overrides the checkpoint's manifest, and flags override both.
"""

import argparse
import difflib
import reprlib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config import start
from megatron_router_upcycling.errors import UserError, error_as
from megatron_router_upcycling.expert_layers import layer_frequency
from megatron_router_upcycling.routers.config import POOLINGS
from megatron_router_upcycling.routers.kinds import KINDS

# Megatron argument -> the RouterConfig field that it sets.
SHARED_WITH_MEGATRON = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_pre_softmax": "pre_softmax",
}
# Names in an ``upcycling:`` section.
OF_ROUTER = ("router", "num_routers", "pooling", "locality_loss_coeff")
SECTION = (*OF_ROUTER, "collect_iters", "router_samples", *start.NAMES)


def add_router(group: Any) -> None:
    """The flags of a router that ``convert`` and training have."""
    group.add_argument("--router", choices=KINDS, help="kind of router; linear is vanilla upcycling")
    group.add_argument("--num-routers", type=int, help="routers in the mixture (default: one an expert)")
    group.add_argument("--pooling", choices=POOLINGS, help="how router scores are combined (default: sum)")


def add_output(group: Any) -> None:
    """The flags of a command that writes a result."""
    group.add_argument("--overwrite", action="store_true", help="replace an output once the new one is whole")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def add_gpu(group: Any) -> None:
    """The flags that describe a GPU, for ``plan`` and a rehearsal."""
    group.add_argument("--gpu-memory-gib", metavar="GIB", type=positive, default=80, help="of one GPU")
    group.add_argument("--peak-tflops", type=positive, default=989, help="dense, in bfloat16; 989: an H100")


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add this package's flags to Megatron's parser; the ``upcycling:`` section has the same names."""
    run = parser.add_argument_group("configuration")
    run.add_argument("--config", metavar="YAML", help="values of flags; the command line's override them")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    run.add_argument("--output", metavar="FILE", help="written by collect_keys, and by a rehearsal as JSON")

    router = parser.add_argument_group("router (a converted checkpoint brings its own)")
    add_router(router)
    add = router.add_argument
    add("--top-k", dest="moe_router_topk", type=int, default=argparse.SUPPRESS, help="is --moe-router-topk")
    add("--locality-loss-coeff", type=float, help="of --router locmoe (default: 0.01)")
    add(
        "--no-moe-router-pre-softmax",
        dest="moe_router_pre_softmax",
        action="store_false",
        default=False,
        help="top-k first, then the softmax over the chosen experts",
    )

    keys = parser.add_argument_group("key statistics (collect_keys)")
    keys.add_argument("--collect-iters", metavar="N", type=int, default=10, help="batches to average over")
    keys.add_argument("--router-samples", metavar="N", type=int, default=512, help="hidden states to keep")
    add_output(keys)

    add = parser.add_argument_group("routing diagnostics").add_argument
    add(
        "--routing-diagnostics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="statistics of an MoE's routers: to SAVE/routing.jsonl, TensorBoard and W&B (default: on)",
    )
    add(
        "--routing-diagnostics-interval",
        metavar="N",
        type=int,
        help="in iterations (default: --log-interval)",
    )

    rehearsal = parser.add_argument_group("rehearsal (rehearse, or pretrain --rehearse N)")
    add = rehearsal.add_argument
    add("--gpus", "--rehearse", dest="rehearse", metavar="N", type=int, help="GPUs of the whole run")
    add("--rehearse-rank", metavar="R", type=int, default=0, help="the rank to run here")
    add("--rehearse-seq-length", metavar="TOKENS", type=int, help="(default: as configured; short on a CPU)")
    add_gpu(rehearsal)
    if frequency := parser._option_string_actions.get("--moe-layer-freq"):
        frequency.type = layer_frequency  # Megatron's own would evaluate the text as Python
    return parser


def positive(text: str) -> float:
    """A flag's number that must be more than 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return number


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def options(parser: ArgumentParser) -> dict[str, tuple[str, argparse.Action]]:
    """The parser's flags by their names in a YAML file: ``num_layers`` -> (``--num-layers``, its action)."""
    actions = parser._option_string_actions
    return {flag.lstrip("-").replace("-", "_"): (flag, action) for flag, action in actions.items()}


def set_defaults(parser: ArgumentParser, entries: dict[str, Any], source: str | Path) -> list[str]:
    """Make ``entries`` (argument name -> value) the parser's defaults; return their attributes.

    They are defaults, not flags put before the user's, because no flag undoes a switch that a manifest or a
    ``base:`` file sets, as ``false`` does, or a value, as ``null`` does.
    """
    known = options(parser)
    values: dict[str, Any] = {}
    for name, value in entries.items():
        key = str(name).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown argument {name!r}{hint}")
        flag, action = known[key]
        where = f"{source}: {key}: {reprlib.repr(value)}"
        values[action.dest] = None if value is None else _parsed(parser, flag, action, value, where)
    parser.set_defaults(**values)
    return list(values)


def _parsed(parser: ArgumentParser, flag: str, action: argparse.Action, value: Any, where: str) -> Any:
    """What the flag's action stores for a YAML file's ``value``; ``where`` begins an error."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} is a switch; write true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value != flag.startswith("--no-")
        if isinstance(action.const, bool):
            return action.const == value
        return action.const if value else action.default
    items = value if isinstance(value, list) and action.nargs not in (None, "?") else [value]
    if any(isinstance(item, list | dict | set) for item in items):
        raise UserError(f"{where} must be one value, or a list where the flag takes several")
    with error_as((argparse.ArgumentError, KeyError), f"{where} is not valid", say=str):
        return parser._get_values(action, [str(item) for item in items])


def split_section(section: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An ``upcycling:`` section's values of flags, and its values of ``InitConfig``."""
    if unknown := [name for name in section if name not in SECTION]:
        raise UserError(f"{source}: unknown upcycling option {unknown[0]!r}; known: {', '.join(SECTION)}")
    init = {name: value for name, value in section.items() if name in start.NAMES}
    return {name: value for name, value in section.items() if name not in init}, init
