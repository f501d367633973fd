"""A kind of router that the package does not know, from the dense model to transformers by its row alone."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.planning import figures, reading
from megatron_router_upcycling.routers import kinds
from tests import hf_models, launch

EXPERTS, TEMPERATURE = 8, 5.0
ROUTER = "decoder.layers.mlp.router"


def cosine_parameters(options: kinds.Options, sizes: kinds.Sizes) -> tuple[kinds.Parameter, ...]:
    return (
        kinds.Parameter("weight", (options.num_experts, sizes.hidden_size), per_expert=True),
        kinds.Parameter("scale.temperature", (1,), constant=TEMPERATURE),
    )


def cosine_logits(gate: dict[str, Any], hidden: Any, options: Any) -> Any:
    from torch.nn.functional import normalize

    keys = normalize(gate["weight"], dim=-1)
    return gate["scale.temperature"] * (normalize(hidden, dim=-1) @ keys.t())


COSINE = kinds.Kind(
    "cosine",
    words="cosine routers",
    card="the cosine of the hidden state and a key for each expert, times a learned temperature",
    parameters=cosine_parameters,
    logits=cosine_logits,
    not_stock=lambda options: "compares by the cosine (--router cosine)",
    scaled="scale.temperature",
)


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


def cosines(router: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The logits by their definition, in float64."""
    keys, temperature = router["weight"].double(), float(router["scale.temperature"])
    lengths = [key.square().sum().sqrt() for key in keys]
    rows = [[x @ key / (x.norm() * n) for key, n in zip(keys, lengths, strict=True)] for x in tokens.double()]
    return temperature * torch.tensor(rows, dtype=torch.float64)


def routers_of(root: Path, layer: int) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(root)
    keys = [key for key in checkpoint.tensors if key.startswith(f"{ROUTER}.")]
    values = {key: checkpoint.read_layer(key, layer, bytearray()) for key in keys}
    return {key.removeprefix(f"{ROUTER}."): value for key, value in values.items()}


def test_from_the_dense_model_to_transformers(
    tmp_path: Path, monkeypatch: Any, dense: Path, moe_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cosine.yaml"  # what ``configs/methods`` would hold of it
    shares = {"num_experts": EXPERTS, "moe_router_topk": 2, "moe_router_pre_softmax": True}
    entries = {"base": str(moe_config), "train_iters": 4, "upcycling": {"router": "cosine"}} | shares
    config.write_text(yaml.safe_dump(entries))
    monkeypatch.setitem(kinds.KINDS, "cosine", COSINE)
    moe, trained, exported = tmp_path / "moe", tmp_path / "run", tmp_path / "hf"
    assert command("convert", dense, moe, "--config", config) == 0
    assert f"{EXPERTS} experts and cosine routers" in capsys.readouterr().out
    record = manifest.read(moe)
    assert record is not None and record["router"]["router"] == "cosine"
    made = routers_of(moe, 1)
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    assert shapes == {"weight": (EXPERTS, 64), "scale.temperature": (1,)}
    assert made["weight"].std() == pytest.approx(0.02, rel=0.2)
    assert float(made["scale.temperature"]) == TEMPERATURE

    assert command("inspect", moe) == 0
    assert "routing at the start" in capsys.readouterr().out
    assert figures.parameters(reading.read(config, moe, [], 1), 0)["routers"] == 4 * (EXPERTS * 64 + 1)

    run = launch.ranks(2, __file__, "--config", config, "--load", moe, "--save", trained,
                       "--expert-model-parallel-size", 2, "--use-distributed-optimizer").ok()  # fmt: skip
    assert list(run.losses) == [1, 2, 3, 4]
    before, after = routers_of(moe, 0), routers_of(trained, 0)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)

    assert command("export-hf", trained, exported) == 2
    assert "its router compares by the cosine (--router cosine)" in capsys.readouterr().err
    assert command("export-hf", trained, exported, "--modelling-code") == 0
    assert "the router is the cosine of the hidden state" in (exported / "README.md").read_text()
    model = hf_models.load(exported, trust_remote_code=True)
    tokens = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        expected = cosines(routers_of(trained, layer), tokens)
        logits, scores, chosen = model.model.layers[layer].mlp.gate(tokens)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        shares = expected.softmax(dim=1).gather(1, chosen)
        torch.testing.assert_close(scores.double(), shares, rtol=1e-5, atol=1e-6)
    assert model(torch.arange(24)[None]).logits.isfinite().all()

    capsys.readouterr()
    assert command("verify", dense, trained) == 0
    assert command("verify", dense, moe) == 0
    assert "cosine routers" in capsys.readouterr().out
    manifest.write(moe, record | {"seed": 1})
    assert command("verify", dense, moe) == 1
    assert f"{ROUTER}.weight" in capsys.readouterr().out

    # Another version of the package, which does not know it, refuses it by name.
    monkeypatch.delitem(kinds.KINDS, "cosine")
    for words in (
        ("convert", dense, tmp_path / "again", "--config", config),
        ("verify", dense, moe),
        ("inspect", moe),
        ("plan", "--config", config, "--gpus", 1),
        ("export-hf", moe, tmp_path / "again"),
    ):
        assert command(*words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "cosine" in said and not (tmp_path / "again").exists()
        assert "choose one of mixture, linear, mlp, switch, locmoe" in said
    unknown = launch.python("-m", "megatron_router_upcycling.pretrain", "--load", moe, "--config", config)
    assert unknown.returncode == 2 and "cosine" in unknown.errors[0]


if __name__ == "__main__":  # pretrain, by whoever knows the kind
    kinds.KINDS["cosine"] = COSINE
    sys.argv[0] = "pretrain"
    runpy.run_module("megatron_router_upcycling.pretrain", run_name="__main__", alter_sys=True)
