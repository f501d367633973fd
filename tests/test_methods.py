"""Every method and every ablation is one YAML file: what it converts to, proved by ``verify``."""

from pathlib import Path

import pytest
import torch

from megatron_router_upcycling import cli, manifest
from tests import dense_checkpoint
from tests.test_upcycle import make_stats

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml") if path.stem != "base")
ROUTER = "decoder.layers.mlp.router"
L, D = dense_checkpoint.LAYERS, dense_checkpoint.HIDDEN
ROUTER_SHAPES = {
    "scratch": {"weight": (L, 8, D)},
    "vanilla": {"weight": (L, 8, D)},
    "switch": {"weight": (L, 8, D)},
    "locmoe": {},
    "mlp": {"fc1.weight": (L, D, D), "fc2.weight": (L, 8, D)},
    "router_upcycling": {"query_weight": (L, 8, 4, D), "expert_key": (L, 8, 4)},
}


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
def test_method_is_one_file(folder: Path, tmp_path: Path, method: str) -> None:
    values = convert(folder, tmp_path / "moe", CONFIGS / "methods" / f"{method}.yaml")
    shapes = {
        key.removeprefix(f"{ROUTER}."): tuple(value.shape) for key, value in values.items() if ROUTER in key
    }
    assert shapes == ROUTER_SHAPES[method]
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    assert record["router"]["top_k"] == (1 if method == "switch" else 2) and record["router"]["pre_softmax"]
    assert cli.main(["verify", str(folder / "dense"), str(tmp_path / "moe"), "--quiet"]) == 0


def test_scratch_is_drawn_as_megatron_draws_and_shares_nothing(folder: Path, tmp_path: Path) -> None:
    file = CONFIGS / "methods/scratch.yaml"
    first = convert(folder, tmp_path / "a", file)
    again = convert(folder, tmp_path / "b", file)
    other = convert(folder, tmp_path / "c", file, "--seed", 5)
    dense = dense_checkpoint.read_back(folder / "dense/iter_0000008")
    for key, value in first.items():
        assert torch.equal(value, again[key])
        if "norm" in key:
            assert (value == 1).all()
        elif key.endswith("bias"):
            assert (value == 0).all()
        else:
            assert not torch.equal(value, other[key]) and not torch.equal(value, dense.get(key, other[key]))
            scaled = (2 * L) ** -0.5 if "linear_proj" in key or "linear_fc2" in key else 1.0
            assert value.std() == pytest.approx(0.02 * scaled, rel=0.1)
            assert value.mean().abs() < 0.002
    fc1 = first["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert not torch.equal(fc1[0, 0], fc1[0, 1]) and not torch.equal(fc1[0, 0], fc1[1, 0])
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "a/release").iterdir())

    layered = convert(folder, tmp_path / "d", file, "--layers", "1")
    assert torch.equal(layered["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"], fc1[1])
    assert cli.main(["verify", str(folder / "dense"), str(tmp_path / "d"), "--quiet"]) == 0


def test_verify_finds_what_differs_in_a_model_from_scratch(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "moe", CONFIGS / "methods/scratch.yaml")
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    manifest.write(tmp_path / "moe", record | {"seed": 1})
    assert cli.main(["verify", str(folder / "dense"), str(tmp_path / "moe"), "--quiet"]) == 1
