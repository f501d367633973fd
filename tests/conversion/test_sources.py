"""Experts of several dense models: what is made, what is proved, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.names import TRAINING_STATE
from megatron_router_upcycling.checkpoint.open import open_checkpoint, open_dense
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.run_log import files as run_log
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint, launch
from tests.conftest import EVALUATE
from tests.dense_checkpoint import HIDDEN, LAYERS, MLP, is_ffn, make_stats

EXPERTS = f"{MLP}.experts.experts"
NORM = "decoder.layers.pre_mlp_layernorm.weight"
TOKENS = 64

Tensors = dict[str, torch.Tensor]


def write(
    root: Path, seed: int, tensor_parallel: int = 1, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Tensors:
    """A dense checkpoint of the usual shapes with values of its own."""
    random = torch.Generator().manual_seed(seed)
    values = {
        key: torch.randn(value.shape, generator=random).to(dtype)
        for key, value in dense_checkpoint.tensors().items()
    }
    shutil.rmtree(root, ignore_errors=True)
    return dense_checkpoint.write(root, values, tensor_parallel, args=dense_checkpoint.arguments(**changes))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Tensors]:
    """DENSE and two others, the first of which is chunked in another way."""
    made = {"dense": write(tmp_path / "dense", 0), "a": write(tmp_path / "a", 1, tensor_parallel=2)}
    return made | {"b": write(tmp_path / "b", 2)}


def write_texts(folder: Path, count: int = 2) -> list[Path]:
    """Key statistics of texts whose router inputs lie apart."""
    paths = [folder / f"text{number}" for number in range(count)]
    for number, path in enumerate(paths):
        stats = make_stats(path)
        stats.router_input = torch.randn(LAYERS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9))
        stats.router_input[..., number] += 8
        key_stats_file.save(path, stats, overwrite=True)
    return paths


def convert(folder: Path, *flags: object, out: str = "moe", experts: tuple[str, ...] = ("a", "b")) -> int:
    """``convert dense OUT --experts ...`` with four experts of a linear router."""
    command = ["convert", folder / "dense", folder / out, "--quiet", "--experts"]
    command += [folder / name for name in experts]
    command += ["--router", "linear", "--num-experts", 4, *flags]
    return cli.main([str(part) for part in command])


OPTIONS: dict[str, tuple[object, ...]] = {
    "plain": (),
    "averaged": ("--average-rest",),
    "cut": ("--granularity", 2),
    "two layers": ("--layers", "0,2"),
    "averaged, two layers, real copies": ("--average-rest", "--layers", "0,2", "--materialize"),
    "shared expert": ("--shared-expert",),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_expert_is_its_models_ffn(tmp_path: Path, models: dict[str, Tensors], name: str) -> None:
    assert convert(tmp_path, *OPTIONS[name]) == 0
    made = dense_checkpoint.read_back(tmp_path / "moe/release")
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe"))
    mean = {
        key: ((models["a"][key].double() + models["b"][key].double()) / 2).bfloat16()
        for key in models["dense"]
    }
    rest = mean if "averaged" in name else models["dense"]
    granularity = 2 if name == "cut" else 1
    layers = (0, 2) if "two layers" in name else range(LAYERS)
    width = dense_checkpoint.FFN // granularity
    for key, value in rest.items():
        of_layers = key.startswith("decoder.layers.")
        for layer in range(LAYERS) if of_layers else ():
            own = key.replace("layers.", f"layers.{layer}.") if "two layers" in name else key

            def stored(key: str, layer: int = layer) -> torch.Tensor:
                return made[key] if "two layers" in name else made[key][layer]

            if not is_ffn(key) or layer not in layers:
                assert torch.equal(stored(own), value[layer]), key
                continue
            for expert in range(4 * granularity):
                whole = models["ab"[expert // granularity % 2]][key][layer]
                part = slice(expert % granularity * width, (expert % granularity + 1) * width)
                halves = whole.unflatten(0, (2, -1))
                whole = halves[:, part].flatten(0, 1) if "fc1" in key else whole[:, part]
                assert torch.equal(stored(own.replace(".mlp.", ".mlp.experts.experts."))[expert], whole)
        assert of_layers or torch.equal(made[key], value)


def test_bytes_are_written_once_a_model(tmp_path: Path, models: dict[str, Tensors]) -> None:
    assert convert(tmp_path) == 0
    moe = open_checkpoint(tmp_path / "moe")
    for key in filter(is_ffn, models["dense"]):
        name = EXPERTS + key.removeprefix(MLP)
        assert len(moe.blobs(name)) == 2 * len(set(moe.blobs(name)))  # four experts, two models
    assert (tmp_path / "moe/release/__0_0.distcp").stat().st_nlink == 2


@pytest.mark.parametrize("flags", [(), ("--average-rest",)], ids=["plain", "averaged"])
def test_proof_without_a_model(tmp_path: Path, models: dict[str, Tensors], flags: tuple[object, ...]) -> None:
    """From the digest of its values; a value of its expert that changed since is found."""
    assert convert(tmp_path, *flags) == 0
    shutil.rmtree(tmp_path / "b")
    ready = proof.prepare(tmp_path / "dense", tmp_path / "moe")
    findings = proof.run(ready)
    assert not findings and "1 of 2 models" in findings.looked_at["experts"]
    assert ("untouched" in findings.skipped) == bool(flags)
    record = json.loads((tmp_path / "moe/router_upcycling.json").read_text())
    record["experts"][1]["values"] = "0" * 64
    (tmp_path / "moe/router_upcycling.json").write_text(json.dumps(record))
    found = proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe")).of("experts")
    assert [one.expert for one in found] == ["1", "3"]


def write_tokenizer(root: Path, tokens: list[str]) -> None:
    (root / "tokenizer").mkdir()
    model = {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": [["a", "b"]]}
    (root / "tokenizer/tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))


def other_tokenizers(folder: Path) -> None:
    for name, tokens in (("dense", ["a", "b"]), ("a", ["a", "b", "c"]), ("b", ["a", "c"])):
        write_tokenizer(folder / name, tokens)


def a_moe(folder: Path) -> None:
    assert convert(folder, out="made") == 0
    shutil.rmtree(folder / "b")
    (folder / "made").rename(folder / "b")


def other(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder / "b", 2, **changes)


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[object, ...], str]] = {
    "a Mixture-of-Experts": (a_moe, (), "--experts: .*/b: a Mixture-of-Experts already"),
    "another norm": (other(layernorm_epsilon=1e-5), (), "--experts .*b: norm_epsilon 1e-05, where DENSE"),
    "another dtype": (other(dtype=torch.float32), (), "b: dtype torch.float32, where DENSE"),
    "another tokenizer": (other_tokenizers, (), "b: tokenizer's token 1 c, where DENSE .* has b;"),
    "nothing": (lambda folder: shutil.rmtree(folder / "b"), (), "b: no checkpoint there"),
    "not a multiple": (lambda _: None, ("--num-experts", 3), "2 models for --num-experts 3; make it"),
    "shared and averaged": (
        lambda _: None, ("--average-rest", "--shared-expert"), "--average-rest: leave --shared-expert out"
    ),
    "too few texts": (
        lambda _: None, ("--gate", "domain", "--key-stats", "text0"), "1 files, and --gate domain tells texts"
    ),
    "too many texts": (
        lambda folder: write_texts(folder, 3), ("--gate", "ridge", "--key-stats", "text0", "text1", "text2"),
        "--key-stats: 3 files for 2 models of --experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, models: dict[str, Tensors], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    change, flags, message = REFUSED[name]
    change(tmp_path)
    assert convert(tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
    assert not (tmp_path / "moe").exists()


def test_norms_of_another_name_matter_only_to_a_mean(
    tmp_path: Path, models: dict[str, Tensors], capsys: pytest.CaptureFixture[str]
) -> None:
    """As Megatron's versions with and without Transformer Engine name them."""
    key = f"{MLP}.linear_fc1.layer_norm_weight"
    values = {NORM if name == key else name: value for name, value in models["b"].items()}
    shutil.rmtree(tmp_path / "b")
    dense_checkpoint.write(tmp_path / "b", values)
    assert convert(tmp_path) == 0
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe"))
    assert convert(tmp_path, "--average-rest", out="mean") == 2
    assert f"{key} None, where DENSE" in capsys.readouterr().err


def test_a_model_that_changes_while_it_is_read(tmp_path: Path, models: dict[str, Tensors]) -> None:
    options = Options(RouterConfig(router="linear"), experts=(tmp_path / "a", tmp_path / "b"))
    ready = conversion.prepare(tmp_path / "dense", tmp_path / "moe", options)

    def save_again(count: int) -> None:
        (tmp_path / "b/iter_0000008/metadata.json").touch()

    with pytest.raises(UserError, match=r"b/iter_0000008/metadata.json: changed while it was read"):
        conversion.convert(ready, save_again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "dense"]


@pytest.mark.parametrize("gate", ["domain", "ridge"])
def test_texts_go_to_their_own_experts(
    tmp_path: Path, models: dict[str, Tensors], capsys: pytest.CaptureFixture[str], gate: str
) -> None:
    texts = write_texts(tmp_path)
    flags = ("--gate", gate, "--target-entropy", 0.9, "--key-stats", *texts)
    assert convert(tmp_path, *flags, "--top-k", 2) == 0
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe"))
    assert cli.main(["inspect", str(tmp_path / "moe")]) == 0
    rows = re.findall(r"^text(\d)((?: +\d+%){4})$", capsys.readouterr().out, flags=re.MULTILINE)
    assert [int(text) for text, _ in rows] == [0, 1]
    for text, shares in rows:
        of_text = [int(share) for share in re.findall(r"\d+", shares)][int(text) :: 2]
        assert sum(of_text) > 90, rows  # experts 0 and 2 are the first model's
    line = {"iteration": 1, "kind": "train", "tokens": 1, "lm_loss": 1.0}
    run_log.append(tmp_path / "moe/run.jsonl", line)  # as if it had trained
    assert cli.main(["report", str(tmp_path / "moe"), "--output", str(tmp_path / "report")]) == 0
    assert "Which experts each text goes to" in (tmp_path / "report/report.html").read_text()


def test_loss_is_that_of_the_models_ffns(
    tmp_path: Path, dense: Path, dense_config: Path, moe_config: Path
) -> None:
    """Megatron's own loop: DENSE with another model's FFNs, as a dense model and as experts."""
    other, hybrid, moe = tmp_path / "other", tmp_path / "hybrid", tmp_path / "moe"
    launch.ranks(1, "pretrain", "--config", dense_config, "--save", other, "--seed", 5).ok()
    sources = open_dense(dense), open_dense(other)
    hybrid.mkdir()
    with CheckpointWriter(hybrid / "release") as writer:
        for key in (*sources[0].tensors, *sources[0].objects):
            if not TRAINING_STATE.match(key):
                writer.take_over(sources[is_ffn(key)], key, key, copy=True)
        writer.finish()
    (hybrid / "latest_checkpointed_iteration.txt").write_text("release")
    convert = ("convert", dense, moe, "--experts", other, "--router", "linear", "--num-experts", 2)
    launch.cli(*convert, "--no-moe-router-pre-softmax").ok()
    losses = [
        launch.ranks(1, "pretrain", "--config", config, "--load", root, *EVALUATE).validation
        for config, root in ((dense_config, hybrid), (moe_config, moe), (dense_config, dense))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-3
