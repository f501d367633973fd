"""The public names: imported when they are used, and a router read back computes the paper's equations."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_router_upcycling
from megatron_router_upcycling import RouterConfig, UserError, api, convert_checkpoint, load_router
from tests import dense_checkpoint
from tests.dense_checkpoint import HEADS, HIDDEN, LAYERS

CONFIGS = {
    "mixture": RouterConfig(),
    "max": RouterConfig(pooling="max", pre_softmax=False),
    "two-keys": RouterConfig(num_experts=4, num_routers=HEADS),
    "linear": RouterConfig(router="linear"),
    "switch": RouterConfig(router="switch", top_k=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint, its key statistics, and what each of CONFIGS makes of them."""
    folder = tmp_path_factory.mktemp("api")
    dense_checkpoint.write(folder / "dense")
    dense_checkpoint.make_stats(folder / "keys")
    for name, config in CONFIGS.items():
        keys = folder / "keys" if config.router == "mixture" else None
        manifest = convert_checkpoint(folder / "dense", folder / name, config, keys)
        assert manifest == json.loads((folder / name / "router_upcycling.json").read_text())
    return folder


def test_importing_the_package_imports_nothing_slow() -> None:
    code = (
        "import sys, megatron_router_upcycling as package\n"
        "from megatron_router_upcycling import cli\n"
        "slow = {'torch', 'numpy', 'transformers', 'megatron'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        "for name in package.__all__: assert getattr(package, name) and name in dir(package), name\n"
        "slow = {'megatron', 'torch._dynamo', 'torch.distributed.checkpoint'} & sys.modules.keys()\n"
        "assert 'torch' in sys.modules and not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=60)


def test_every_public_name_is_documented() -> None:
    for name in megatron_router_upcycling.__all__:
        text = getattr(api, name).__doc__
        assert text and ("Example:" in text or name[0].isupper()), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_router_upcycling.nothing  # noqa: B018


def test_more_experts(folder: Path) -> None:
    record = api.add_experts(folder / "linear", folder / "more", 16, seed=3)
    assert (record["router"]["num_experts"], record["seed"]) == (16, 3)
    assert not api.verify_checkpoint(folder / "linear", folder / "more")
    with pytest.raises(UserError, match="--allow-no-export"):
        api.add_experts(folder / "linear", folder / "none", 16, keep_function=True)


def test_conversions_are_right_and_a_difference_is_found(folder: Path) -> None:
    for name in CONFIGS:
        findings = api.verify_checkpoint(folder / "dense", folder / name)
        assert not findings, findings.table()
    text = api.inspect_checkpoint(folder / "linear")
    assert all(part in text for part in ("Mixture-of-Experts", '"router": "linear"', "routing at the start"))
    # The manifest names another seed than the one that the router was drawn from.
    convert_checkpoint(folder / "dense", folder / "altered", CONFIGS["linear"], seed=1)
    manifest = folder / "altered" / "router_upcycling.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seed": 2}))
    assert api.verify_checkpoint(folder / "dense", folder / "altered").of("routers")


@pytest.mark.parametrize(("name", "layer"), [("mixture", 0), ("max", 1), ("two-keys", 2)])
def test_a_mixture_computes_equations_6_to_8(folder: Path, name: str, layer: int) -> None:
    router = load_router(folder / name, layer)
    W, K = router.parameters["query_weight"].double(), router.parameters["expert_key"].double()
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(layer))
    keys, pool = len(K) // router.config.num_experts, max if router.config.pooling == "max" else sum
    for token, logits in zip(x.double(), router.logits(x).double(), strict=True):
        scores = [pool(float(w @ token @ k) / math.sqrt(K.shape[1]) for w in W) for k in K]
        expected = [max(scores[i : i + keys]) for i in range(0, len(K), keys)]
        assert logits.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_routes_to_the_best(folder: Path, name: str) -> None:
    router = load_router(folder / name, 1)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    logits, (weights, experts), k = router.logits(x), router.route(x), router.config.top_k
    assert weights.shape == experts.shape == (2, 3, k)
    for at in [(b, t) for b in range(2) for t in range(3)]:
        scores, chosen = logits[at].tolist(), experts[at].tolist()
        # Heads of one query group make experts of equal scores, of which any will do.
        assert len(set(chosen)) == k and [scores[i] for i in chosen] == sorted(scores, reverse=True)[:k]
        among = range(len(scores)) if router.config.pre_softmax else chosen
        total = sum(math.exp(scores[i]) for i in among)
        expected = [math.exp(scores[expert]) / total for expert in chosen]
        assert weights[at].tolist() == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=f"layer {LAYERS}: .* has layers 0 to {LAYERS - 1}"):
        load_router(folder / "mixture", LAYERS)
    with pytest.raises(UserError, match="has no router_upcycling.json"):
        load_router(folder / "dense")
    with pytest.raises(UserError, match="--key-stats"):
        convert_checkpoint(folder / "dense", folder / "new")
    convert_checkpoint(folder / "dense", folder / "some", RouterConfig(router="linear"), layers="1")
    assert load_router(folder / "some", 1).parameters["weight"].shape == (8, HIDDEN)
    with pytest.raises(UserError, match="has no decoder.layers.mlp.router.weight"):
        load_router(folder / "some", 0)
