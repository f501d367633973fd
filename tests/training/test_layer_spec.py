"""The layer spec: what it replaces, where it takes its options from, and a model that Megatron builds."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import global_vars
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.layers.dispatch import UpcycledMoELayer
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.mixture import MixtureRouter
from megatron_router_upcycling.training import layer_spec
from megatron_router_upcycling.training.layer_spec import ENVIRONMENT, layer_spec_for, upcycled_layer_spec

pytestmark = pytest.mark.usefixtures("megatron")
LAYERS = 4
ROUTER = RouterConfig(num_experts=4, top_k=2, num_routers=2)


def model_config(**changes: Any) -> GPTModelConfig:
    values: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": 16, "ffn_hidden_size": 32}
    values |= {"num_attention_heads": 4, "num_moe_experts": 4, "moe_router_topk": 2}
    values |= {"moe_router_pre_softmax": True, "add_bias_linear": False, "gated_linear_unit": True}
    values |= {"normalization": "RMSNorm", "transformer_impl": "local", "use_cpu_initialization": True}
    sizes = {"vocab_size": 64, "seq_length": 8}
    transformer = TransformerConfig(**values | changes)
    return GPTModelConfig(transformer=transformer, **sizes, position_embedding_type="rope")


def routers_of(spec: Any) -> list[Any]:
    """For each layer, what builds its router, or None for a dense layer."""
    layers = [layer.submodules.mlp.keywords["submodules"] for layer in spec.layer_specs]
    return [None if isinstance(inner, MLPSubmodules) else inner.router for inner in layers]


def is_ours(build: Any, router: RouterConfig = ROUTER) -> bool:
    return isinstance(build, partial) and build.func is MixtureRouter and build.keywords == {"router": router}


def build_model(config: GPTModelConfig) -> torch.nn.Module:
    config.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)


def test_every_layer_has_our_router_and_nothing_else_differs() -> None:
    config = model_config()
    spec = layer_spec_for(ROUTER)(config, vp_stage=None)
    default = gpt.default_layer_spec(config, None)
    assert len(spec.layer_specs) == LAYERS and all(map(is_ours, routers_of(spec)))
    assert routers_of(default) == [TopKRouter] * LAYERS  # Megatron's own spec is left alone
    ours = repr(routers_of(spec)[0])
    renamed = ", 'pre_mlp_layernorm.': 'mlp.linear_fc1.layer_norm_'"  # only without Transformer Engine
    assert renamed in repr(default)
    found = repr(spec).replace(ours, repr(TopKRouter)).replace(repr(UpcycledMoELayer), repr(MoELayer))
    assert found == repr(default).replace(renamed, "")


def test_dense_layers_stay_dense() -> None:
    for frequency, pattern in ((2, [True, False] * 2), ([0, 1, 1, 0], [False, True, True, False])):
        routers = routers_of(layer_spec_for(ROUTER)(model_config(moe_layer_freq=frequency)))
        assert [build is not None and is_ours(build) for build in routers] == pattern


def test_a_dense_model_and_a_linear_router_get_megatrons_own_spec(arguments: Namespace) -> None:
    linear = RouterConfig(router="linear", num_experts=4)
    assert routers_of(layer_spec_for(linear)(model_config())) == [TopKRouter] * LAYERS
    for spec in (layer_spec_for(ROUTER), upcycled_layer_spec):
        dense = spec(model_config(num_moe_experts=None))
        assert isinstance(dense.submodules.mlp.keywords["submodules"], MLPSubmodules)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_moe_experts": 8}, "--num-experts 8: .* made for 4"),
        ({"moe_router_topk": 1}, "--moe-router-topk 1: .* made for 2"),
        ({"moe_router_pre_softmax": False}, "--moe-router-pre-softmax False: .* made for True"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl inference_optimized: .* or local"),
    ],
)
def test_flags_that_contradict_the_router_are_the_users_error(changes: dict[str, Any], message: str) -> None:
    config = model_config()
    vars(config.transformer).update(changes)
    with pytest.raises(UserError, match=message):
        layer_spec_for(ROUTER)(config)


@pytest.mark.parametrize("mlp", [MoELayer, partial(MoELayer)])
def test_a_spec_of_another_shape_is_refused_loudly(monkeypatch: pytest.MonkeyPatch, mlp: Any) -> None:
    """As a later Megatron might build it."""
    spec = gpt.default_layer_spec(model_config(), None)
    spec.layer_specs[0].submodules.mlp = mlp
    monkeypatch.setattr(layer_spec, "default_layer_spec", lambda config, vp_stage: spec)
    with pytest.raises(RuntimeError, match="the mlp of a layer's spec is .* tested with"):
        layer_spec_for(ROUTER)(model_config())


def test_megatron_builds_a_model_with_it() -> None:
    config = model_config()
    config.transformer_layer_spec = layer_spec_for(ROUTER)
    model = build_model(config)
    names = {name for name, _ in model.named_parameters() if ".router." in name}
    routers = [f"decoder.layers.{layer}.mlp.router" for layer in range(LAYERS)]
    assert names == {f"{router}.{name}" for router in routers for name in ("query_weight", "expert_key")}
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group()})
    for parameter, shape in (("query_weight", (2, 8, 16)), ("expert_key", (4, 8))):
        entries = [e for e in sharded.values() if e.key == f"decoder.layers.mlp.router.{parameter}"]
        assert [entry.global_shape for entry in entries] == [(LAYERS, *shape)] * LAYERS
        assert [entry.global_offset[0] for entry in entries] == list(range(LAYERS))


def test_multi_token_prediction_layers_keep_the_linear_router() -> None:
    config = model_config(mtp_num_layers=1)
    config.transformer_layer_spec = layer_spec_for(ROUTER)
    modules = build_model(config).named_modules()
    kinds = {name.split(".")[0]: type(module) for name, module in modules if name.endswith("mlp.router")}
    assert kinds == {"decoder": MixtureRouter, "mtp": TopKRouter}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """Megatron's global arguments, as far as the spec reads them."""
    args = Namespace(load=None, pretrained_checkpoint=None, save=None, rank=0)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    yield args


def record(root: Path, router: RouterConfig) -> str:
    root.mkdir()
    manifest.write(root, {"format": manifest.FORMAT, "router": router.to_dict(), "model": {}})
    return str(root)


def options(router: RouterConfig = ROUTER) -> bool:
    """Whether Megatron's --spec builds every layer with the options of ``router``."""
    return all(is_ours(build, router) for build in routers_of(upcycled_layer_spec(model_config())))


def test_the_checkpoint_that_is_loaded_comes_first(arguments: Namespace, tmp_path: Path) -> None:
    other = dataclasses.replace(ROUTER, num_routers=4)
    arguments.save = record(tmp_path / "save", other)
    assert options(other)
    # The pretrained one serves where --load has none.
    arguments.load = str(tmp_path / "not_there_yet")
    arguments.pretrained_checkpoint = record(tmp_path / "converted", ROUTER)
    assert options()
    arguments.load = record(tmp_path / "load", dataclasses.replace(ROUTER, pooling="max"))
    assert options(dataclasses.replace(ROUTER, pooling="max"))
    assert manifest.read(arguments.save)["router"] == other.to_dict()  # what is there already stays


def test_rank_0_leaves_the_manifest_for_a_later_resume(arguments: Namespace, tmp_path: Path) -> None:
    arguments.load, arguments.save = record(tmp_path / "load", ROUTER), str(tmp_path / "save")
    for arguments.rank in (1, 0):
        assert options()
        assert manifest.read(arguments.save) == (None if arguments.rank else manifest.read(arguments.load))


def test_a_yaml_file_in_the_environment_comes_before_all(
    arguments: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"--spec: no {manifest.NAME} in --load, .*{ENVIRONMENT}"):
        options()
    arguments.load = record(tmp_path / "load", ROUTER)
    path = tmp_path / "router.yaml"
    monkeypatch.setenv(ENVIRONMENT, str(path))
    with pytest.raises(UserError, match=f"{ENVIRONMENT}={path}: no such file"):
        options()
    path.write_text("lr: 1.0\nupcycling: {num_routers: 4, pooling: max, collect_iters: 3}\n")
    assert options(dataclasses.replace(ROUTER, num_routers=4, pooling="max"))
    path.write_text("upcycling: {num_experts: 8}\n")
    with pytest.raises(UserError, match="--num-experts 4: the router was made for 8"):
        options()
