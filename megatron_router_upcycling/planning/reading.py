"""Read a run's sizes from the YAML files, manifests and flags that ``pretrain`` takes; ignore all else."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.checkpoint.dense_model import NEGATED
from megatron_router_upcycling.config import flags as config_flags
from megatron_router_upcycling.config import manifest, yaml_files
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.expert_layers import layer_frequency
from megatron_router_upcycling.planning.setup import Setup, complete
from megatron_router_upcycling.routers.config import RouterConfig

# If one of these is set, a plan does not cover the model or its layout.
NOT_COVERED = (
    *("multi_latent_attention", "mtp_num_layers", "moe_latent_size", "hybrid_layer_pattern"),
    *("attention_output_gate", "heterogeneous_layers_config_path", "experimental_attention_variant"),
    *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
    *("account_for_loss_in_pipeline_split", "use_megatron_fsdp", "use_torch_fsdp2"),
    *("use_precision_aware_optimizer", "optimizer_cpu_offload", "fp8_param_gather"),
    *("fine_grained_activation_offloading", "cpu_offloading_num_layers", "distribute_saved_activations"),
    *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
)
# Similarity from which an unknown name counts as a misspelt one, and Megatron's own names that are exempt.
SIMILAR, OTHERS = 0.89, {"pad_vocab_size"}
IN_WORDS = {bool: "true or false", int: "a whole number, not negative", str: "a name"}


def read(config_file: Path | None, load: Path | None, flags: Sequence[str], world_size: int) -> Setup:
    """The run that a checkpoint's manifest, a YAML file and Megatron flags describe, in rising precedence."""
    entries: dict[str, Any] = yaml_files.read_yaml(config_file) if config_file else {"upcycling": {}}
    router, _ = config_flags.split_section(entries.pop("upcycling"), str(config_file))
    values = entries | parse_flags(flags)
    router |= {name: values.pop(name) for name in config_flags.SECTION if name in values}
    if load := load or values.get("load"):
        recorded, made = _read_manifest(load)
        values, router = recorded | values, made | router
    return from_values(values | {"world_size": world_size}, router, str(config_file or load))


def _read_manifest(load: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Megatron's arguments and the router's options that a converted checkpoint records."""
    recorded = manifest.read(load)
    if recorded is None:
        raise UserError(f"--load {load}: no {manifest.NAME} there; name the root folder of what convert made")
    if not isinstance(recorded.get("router"), dict):
        return recorded["model"], {}
    router = manifest.router_config(recorded, str(load))
    shared = config_flags.SHARED_WITH_MEGATRON.items()
    return recorded["model"] | {name: getattr(router, field) for name, field in shared}, router.to_dict()


class NotCovered(UserError):
    """A flag that may be valid but that a plan does not model."""


def from_values(values: dict[str, Any], router: dict[str, Any], source: str) -> Setup:
    """A complete Setup from Megatron's arguments (others are ignored) and router options; errors name
    ``source``."""
    known = {field.name: field.type for field in dataclasses.fields(Setup) if field.name != "router"}
    taken: dict[str, Any] = {}
    for name, value in values.items():
        near = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR) if name not in known else []
        if near and name not in OTHERS:
            raise UserError(f"{source}: unknown argument {name!r}; did you mean {near[0]!r}?")
        if (name in NOT_COVERED and value) or (name == "optimizer" and value not in (None, "adam")):
            raise NotCovered(f"{source}: {config_flags.flag_of(name)} is not covered by plan and --rehearse")
        if name in NEGATED:
            taken[NEGATED[name]] = not value
        elif name in known and value is not None:
            taken[name] = _checked(name, value, known[name], source)
    setup = complete(Setup(**taken))
    if not setup.num_experts:
        return setup
    names = [field.name for field in dataclasses.fields(RouterConfig)]
    options = {name: router[name] for name in names if router.get(name) is not None}
    options |= {"num_experts": setup.num_experts, "top_k": setup.moe_router_topk}
    off = values.get("no_moe_router_pre_softmax")
    options["pre_softmax"] = bool(values.get("moe_router_pre_softmax")) and not off
    made = RouterConfig.from_dict({"router": "linear"} | options, source)
    made.check_trains(values)
    return dataclasses.replace(setup, router=made)


def _checked(name: str, value: Any, kind: Any, source: str) -> Any:
    """``value``, checked and converted to the field's type."""
    flag = f"{source}: {config_flags.flag_of(name)}"
    if name == "moe_layer_freq":
        return layer_frequency(value, flag)
    if name == "recompute_modules":
        return tuple(map(str, value if isinstance(value, list) else [value]))
    if type(value) is not kind or (kind is int and value < 0):
        raise UserError(f"{flag} {value}: must be {IN_WORDS[kind]}")
    return value


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Megatron's flags as argument name -> value; several values become a list, no value becomes True."""
    found: dict[str, list[Any]] = {}
    for word in flags:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [_value(value)] if value else []
        elif not found:
            raise UserError(f"{word}: belongs to no flag; flags of Megatron begin with --")
        else:
            found[name].append(_value(word))
    return {name: values if len(values) > 1 else (values or [True])[0] for name, values in found.items()}


def _value(word: str) -> Any:
    """A flag's value parsed as YAML, or unchanged if it is not valid YAML."""
    try:
        return yaml.safe_load(word)
    except (yaml.YAMLError, RecursionError):  # such as [0]+[1]*3
        return word
