"""Every method is one YAML file, of which ``convert`` takes what it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_router_upcycling import cli
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import read_method
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import keys_per_expert
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats
from tests.router_kinds import KINDS

CONFIGS = Path(__file__).parents[2] / "configs"
# The paper's.
OTHERS = ("base", "scratch", "balanced", "recommended", "domains", "more_experts")
METHODS = sorted(
    path.stem
    for path in (CONFIGS / "methods").glob("*.yaml")
    if path.stem not in OTHERS and not path.stem.startswith("calibrated")
)
ROUTER = "decoder.layers.mlp.router"
L, D = dense_checkpoint.LAYERS, dense_checkpoint.HIDDEN


def kind_of(method: str) -> str:
    """The kind of router that a method's file asks for."""
    return str(yaml.safe_load((CONFIGS / f"methods/{method}.yaml").read_text())["upcycling"]["router"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    dense_checkpoint.write(folder / "dense")
    make_stats(folder / "ks")
    return folder


def convert(folder: Path, out: Path, file: Path, *flags: object) -> dict[str, torch.Tensor]:
    command = ["convert", folder / "dense", out, "--config", file, "--key-stats", folder / "ks", "--quiet"]
    assert cli.main([str(part) for part in (*command, *flags)]) == 0
    return dense_checkpoint.read_back(out / "release")


@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_as_many_experts_as_their_papers(method: str) -> None:
    router = RouterConfig(**read_method(CONFIGS / f"methods/{method}.yaml").router)
    assert router.top_k == KINDS[router.router].top_k and router.pre_softmax


# METHOD, over H = 16 heads of size 64 as in the paper: m, n, c, d'.
TABLE_2 = {
    "m2": (2, 8, 1, 512),
    "m4": (4, 8, 1, 256),
    "m8": (8, 8, 1, 128),
    "m16": (16, 8, 2, 64),
    "m32": (32, 8, 4, 32),
    "m16_n16": (16, 16, 1, 64),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_shapes_of_table_2(name: str) -> None:
    given = read_method(CONFIGS / f"ablations/{name}.yaml").router
    m, n, c, width = TABLE_2[name]
    assert keys_per_expert(RouterConfig(**given)) == c
    for num_heads, head_dim in ((16, 64), (8, 16)):  # the paper's model, the demonstration's
        shape = RouterConfig(**given).shape(num_heads, head_dim)
        assert (shape.num_routers, shape.num_experts) == (m, n)
        assert shape.router_width == num_heads * head_dim // m
    assert RouterConfig(**given).shape(16, 64).router_width == width


def inputs(path: Path) -> torch.Tensor:
    """Key statistics with a sample of router inputs [L, 64, D]."""
    stats = make_stats(path)
    stats.router_input = torch.randn(L, 64, D, generator=torch.Generator().manual_seed(3))
    key_stats_file.save(path, stats, overwrite=True)
    return stats.router_input


def option(folder: Path, out: Path, base: str, *flags: object, **options: Any) -> dict[str, torch.Tensor]:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"base": str(CONFIGS / f"methods/{base}.yaml"), "upcycling": options}))
    return convert(folder, out, file, *flags)


@pytest.mark.parametrize("method", ["router_upcycling", "vanilla", "mlp"])
def test_routing_has_the_entropy_that_was_asked_for(tmp_path: Path, method: str) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    sample = inputs(tmp_path / "ks")
    made = option(tmp_path, tmp_path / "moe", method, target_entropy=1.2)
    for layer in range(L):
        router = {
            key.removeprefix(f"{ROUTER}."): value[layer] for key, value in made.items() if ROUTER in key
        }
        scores = torch.tensor([KINDS[kind_of(method)].logits(router, x, 8) for x in sample[layer]])
        entropy = torch.distributions.Categorical(logits=scores).entropy().mean()
        assert entropy == pytest.approx(1.2, abs=1e-3)


def test_the_flag_stands_above_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs(tmp_path / "ks")
    dense_checkpoint.write(tmp_path / "dense")
    by_flag = convert(tmp_path, tmp_path / "a", CONFIGS / "methods/calibrated.yaml", "--target-entropy", 1.2)
    by_file = option(tmp_path, tmp_path / "b", "router_upcycling", target_entropy=1.2)
    assert all(torch.equal(value, by_file[key]) for key, value in by_flag.items())
    record = manifest.read(tmp_path / "a")
    assert record is not None and record["init"]["target_entropy"] == 1.2
    for flags, message in (
        (("--router", "locmoe"), "is for --router mixture or linear or mlp or switch, not for locmoe"),
        ((), "and must be between 0 and ln 8"),
    ):
        command = ["convert", tmp_path / "dense", tmp_path / "c", "--target-entropy", 9, *flags]
        assert cli.main([str(part) for part in command]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "linear", "head_key": "mean"}, "--head-key mean: --router linear needs --gate heads"),
        ({"equalize": True, "pooling": "max"}, "--equalize: is for --pooling sum"),
        ({"equalize": "keys"}, "equalize keys: choose one of true, rows, logits"),
        ({"router": "mlp", "center": True}, "--center: is for --router mixture or linear or switch"),
        ({"gate": "centroid"}, "--gate centroid: is for --router linear or switch, not for mixture"),
        ({"target_entropy": 3.0}, "--target-entropy 3.0: is in nats and must be between 0 and ln 8 = 2.0794"),
        ({"target_entropy": 1.0}, "holds no hidden states (router_input)"),
        ({"keys": "none"}, "keys none: choose one of heads, random"),
        ({"target_entropy": "much"}, "option target_entropy cannot be 'much'"),
        ({"entropy": 1}, "unknown upcycling option 'entropy'"),
        ({"router": "locmoe", "locality_loss_coeff": -1}, "locality_loss_coeff -1: must be 0 or more"),
        ({"router": "switch"}, "--router switch: needs --top-k 1"),
    ],
)
def test_what_a_start_cannot_be_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError):
        option(folder, tmp_path / "moe", "router_upcycling", **options)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
