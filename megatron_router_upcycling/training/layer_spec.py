"""Megatron's layer spec with an upcycled router in ``MoESubmodules.router``.

``layer_spec_for(router)`` is what ``GPTModelConfig.transformer_layer_spec`` takes. Megatron-LM's unchanged
``pretrain_gpt.py`` takes ``--spec megatron_router_upcycling.layer_spec upcycled_layer_spec``, which reads the
router's options from the checkpoint's manifest or, to train from scratch, from the ``upcycling:`` section of
a YAML file that the environment variable MEGATRON_ROUTER_UPCYCLING_CONFIG names.

Multi-token-prediction layers keep Megatron's linear router: Megatron builds their spec separately
(``megatron.training.models.gpt.mtp_block_spec``), and they have no dense layer to start from.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_router_upcycling.checkpoint.names import SEPARATE_NORM, within_layer
from megatron_router_upcycling.config import agreement, manifest, yaml_files
from megatron_router_upcycling.config.flags import SHARED_WITH_MEGATRON, flag_of
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.layers.captured import PartlyCapturedLayer
from megatron_router_upcycling.layers.dispatch import UpcycledMoELayer
from megatron_router_upcycling.routers.base import builder
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.patches import optimizer, patching

ENVIRONMENT = "MEGATRON_ROUTER_UPCYCLING_CONFIG"

type Spec = ModuleSpec | TransformerBlockSubmodules

_reported: list[str] = []  # names of routers' own metrics


def layer_spec_for(router: RouterConfig) -> Callable[..., Spec]:
    """A callable (model_config, vp_stage=None) that returns Megatron's default spec with ``router`` in it."""
    return partial(_build_spec, router=router)


def upcycled_layer_spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> Spec:
    """The spec for ``--spec megatron_router_upcycling.layer_spec upcycled_layer_spec``."""
    transformer = model_config.transformer
    if transformer.num_moe_experts is None:
        return default_layer_spec(model_config, vp_stage)
    return _build_spec(model_config, vp_stage, router=_find_router(get_args(), transformer))


def _find_router(args: Namespace, transformer: TransformerConfig) -> RouterConfig:
    """The router's options: from the environment's YAML file, else from a checkpoint's manifest.

    Rank 0 copies that manifest to ``--save``, so that a run which resumes there finds it.
    """
    if path := os.environ.get(ENVIRONMENT):
        if not Path(path).is_file():
            raise UserError(f"{ENVIRONMENT}={path}: no such file; name one with an upcycling: section")
        section = yaml_files.read_yaml(path)["upcycling"]
        known = {field.name for field in fields(RouterConfig)}
        of_router = {name: value for name, value in section.items() if name in known}
        options = {field: value for _, field, value in _shared(transformer)} | of_router
        return RouterConfig.from_dict(options, path)
    recorded, root = agreement.find_manifest((args.load, args.pretrained_checkpoint, args.save))
    if recorded is None:
        raise UserError(
            "--spec: no router_upcycling.json in --load, --pretrained-checkpoint or --save; load a converted"
            f" checkpoint, or set {ENVIRONMENT} to a YAML file with an upcycling: section"
        )
    if args.rank == 0 and args.save and manifest.read(args.save) is None:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        manifest.write(args.save, recorded)
    return manifest.router_config(recorded, str(root))


def _shared(transformer: TransformerConfig) -> Iterator[tuple[str, str, Any]]:
    """The router's options in a model's configuration: Megatron's flag, RouterConfig's field, the value."""
    for name, field in SHARED_WITH_MEGATRON.items():
        attribute = "num_moe_experts" if name == "num_experts" else name
        yield flag_of(name), field, getattr(transformer, attribute)


def _build_spec(model_config: GPTModelConfig, vp_stage: int | None = None, *, router: RouterConfig) -> Spec:
    """Megatron's default spec with ``router`` in every MoE layer; dense layers are unchanged."""
    device.check_implementation(model_config.transformer.transformer_impl)
    spec = default_layer_spec(model_config, vp_stage)
    if model_config.transformer.num_moe_experts is None:
        return spec
    for flag, field, found in _shared(model_config.transformer):
        if found != (expected := getattr(router, field)):
            raise UserError(f"{flag} {found}: the router was made for {expected}; give that value")
    optimizer.install_muon()
    for name in router.kind.metrics:
        report_also(name)  # here, since all ranks run this: stages without experts must report it too
    transformer = model_config.transformer
    layers = [_with_router(layer, router) for layer in spec.layer_specs]
    if transformer.cuda_graph_impl == "local" and transformer.cuda_graph_modules:
        if others := [layer.module for layer in layers if layer.module is not TransformerLayer]:
            raise patching.changed(
                "layer_spec", f"a layer's spec builds {others[0]!r}, not TransformerLayer,"
            )
        layers = [replace(layer, module=PartlyCapturedLayer) for layer in layers]
    return replace(spec, layer_specs=layers)


def report_also(name: str) -> None:
    """Add ``name`` to the MoE metrics that Megatron logs, whose own list is fixed. Call it on every rank."""
    patching.wrap("layer_spec", MoEMetricsTracker, "report", _with_more_names, reads=("track_names",))
    if name not in _reported:
        _reported.append(name)


def _with_more_names(
    report: Callable[..., str], self: MoEMetricsTracker, *args: Any, track_names: Any = None, **kwargs: Any
) -> str:
    if track_names is not None:
        given = [track_names] if isinstance(track_names, str) else track_names
        track_names = [*given, *(name for name in _reported if name not in given)]
    return report(self, *args, track_names=track_names, **kwargs)


def _with_router(layer: ModuleSpec, router: RouterConfig) -> ModuleSpec:
    """A copy of a layer's spec whose MoE layer builds ``router``, with one name for the norm before it.

    Megatron saves that norm as ``mlp.linear_fc1.layer_norm_weight`` without Transformer Engine, and as
    ``pre_mlp_layernorm.weight`` with it. The latter is used here, because both can load it.
    """
    submodules: Any = layer.submodules
    mlp: Any = getattr(submodules, "mlp", None)
    inner = mlp.keywords.get("submodules") if isinstance(mlp, partial) else None
    if isinstance(inner, MLPSubmodules):
        return layer
    if not isinstance(inner, MoESubmodules) or mlp.func is not MoELayer:
        expected = "partial(MoELayer, submodules=MoESubmodules)"
        raise patching.changed("layer_spec", f"the mlp of a layer's spec is {mlp!r}, not {expected},")
    if router.kind.module is not None:
        inner = replace(inner, router=builder(router))
    routed = partial(UpcycledMoELayer, *mlp.args, **(mlp.keywords | {"submodules": inner}))
    norm = within_layer(SEPARATE_NORM)
    names = {k: v for k, v in submodules.sharded_state_dict_keys_map.items() if k != norm}
    return replace(layer, submodules=replace(submodules, mlp=routed, sharded_state_dict_keys_map=names))
