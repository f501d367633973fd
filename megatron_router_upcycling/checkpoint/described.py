"""Find a model's architecture where the checkpoint's training arguments do not give it. Pure: no torch.

Megatron-Bridge writes ``run_config.yaml``, ms-swift ``config.json``; ``--config`` describes any checkpoint.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from megatron_router_upcycling.checkpoint import dense_model, read_config_json
from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, MODEL_DEFAULTS, NEGATED
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError, described, error_as, shown

RUN_CONFIG, CONFIG_JSON = "run_config.yaml", "config.json"
SIZES = ("num_layers", "hidden_size", "num_attention_heads")
WAY_OUT = "describe the model with --config model.yaml, a YAML file of its Megatron flags"
# A dense model's flags.
FLAGS = {*ARCHITECTURE, *NEGATED, *MODEL_DEFAULTS} - {"num_experts"}
FLAGS |= {"num_query_groups", "vocab_size", "max_position_embeddings"}
# Megatron-Bridge's name -> Megatron's argument, where they differ.
OF_BRIDGE = {
    "seq_length": "max_position_embeddings",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "rope_scaling": "use_rope_scaling",
}
# (whether the FFN is gated, its activation) -> the Megatron flag that builds it.
ACTIVATIONS = {
    (True, "silu"): "swiglu",
    (True, "quick_gelu"): "quick_geglu",
    (False, "squared_relu"): "squared_relu",
    (False, "gelu"): None,
}
UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError),
    yaml.YAMLError,
)
POSITIONS = ("rope", "learned_absolute", "none")


def gives_architecture(args: Any) -> TypeGuard[Namespace]:
    """Whether ``args`` are Megatron's training arguments, and not another tool's."""
    return isinstance(args, Namespace) and all(getattr(args, name, None) is not None for name in SIZES)


def find(root: Path, folder: Path, config: Path | None) -> tuple[Namespace, str]:
    """Megatron's arguments for the model in ``folder``, an iteration of ``root``, and their source."""
    if config and (flags := of_yaml(config)):
        return dense_model.megatron_arguments(flags), f"--config {config}"
    for path in (folder / RUN_CONFIG, root / CONFIG_JSON, folder / CONFIG_JSON):
        if path.is_file():
            fault = f"{path}: holds no model that can be read"
            with error_as(UNREADABLE, fault, f"; {WAY_OUT}", described):
                text = path.read_text("utf-8")
                if path.name == RUN_CONFIG:
                    flags = _of_run_config(yaml.safe_load(text)["model"])
                else:
                    flags = read_config_json.to_flags(json.loads(text), path, 1)
                return dense_model.megatron_arguments(flags), str(path)
    raise UserError(
        f"{folder}: holds no training arguments of Megatron's, no {RUN_CONFIG}, no {CONFIG_JSON}; {WAY_OUT}"
    )


def of_yaml(config: Path) -> dict[str, Any] | None:
    """A dense model's flags from a YAML file; None if it gives no architecture, as in ``configs/methods``."""
    flags = {name: _number(value) for name, value in read_yaml(config).items() if name in FLAGS}
    if any(flags.get(name) is None for name in SIZES):
        return None
    with error_as(UNREADABLE, f"--config {config}: {', '.join(SIZES)} are no numbers"):
        return flags | {name: int(flags[name]) for name in SIZES}


def check(config: Path, args: Namespace, root: Path) -> None:
    """Refuse a YAML file that differs from the training arguments in the checkpoint ``root``."""
    flags = of_yaml(config) or {}
    given = dense_model.megatron_arguments(flags)
    for flag, name in (ARCHITECTURE | NEGATED).items():
        if flag in flags and name in args and getattr(given, name) != getattr(args, name):
            raise UserError(
                f"--config {config}: {name} {shown(getattr(given, name))}, but the checkpoint {root} was"
                f" trained with {shown(getattr(args, name))}"
            )


def _number(value: Any) -> Any:
    """A flag's value, as a number where it is one: YAML reads 1e-6 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _of_run_config(section: dict[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, by name, from Megatron-Bridge's description of a model."""
    section = section | (section.get("transformer") or {})  # newer versions nest these
    values = {OF_BRIDGE.get(name, name): value for name, value in section.items()}
    gated = bool(values.get("gated_linear_unit"))
    activation = values.get("activation_func") or ("silu" if gated else "gelu")
    if isinstance(activation, dict):
        activation = activation["_target_"]
    activation = str(activation).rpartition(".")[2]
    positions = values.get("position_embedding_type", "learned_absolute")
    if (gated, activation) not in ACTIVATIONS or positions not in POSITIONS:
        what = f"{'gated ' * gated}{shown(activation)} and position embedding {shown(positions)}"
        raise ValueError(f"{what}, which together are not covered")
    names = {*MODEL_DEFAULTS, *(ARCHITECTURE | NEGATED).values(), "vocab_size", "max_position_embeddings"}
    found = {name: values[name] for name in names & values.keys() if values[name] is not None}
    found["num_query_groups"] = values.get("num_query_groups") or values["num_attention_heads"]
    found["group_query_attention"] = True
    found["untie_embeddings_and_output_weights"] = not values.get("share_embeddings_and_output_weights", True)
    if switch := ACTIVATIONS[gated, activation]:
        found[switch] = True
    sizes = {name: int(values[name]) for name in SIZES}
    return {"ffn_hidden_size": 4 * sizes["hidden_size"]} | found | sizes
