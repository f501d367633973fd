"""More experts of a trained Mixture-of-Experts, in Megatron's own loop and in transformers."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.training.run_log import files as run_log
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint, hf_models, launch
from tests.conftest import EVALUATE, LAYERS, VOCABULARY
from tests.reference.megatron_ffn import MegatronFFN

type Trained = tuple[Path, dict[int, float]]

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
ROUTER = "decoder.layers.mlp.router.expert_key"


def grow(moe: Path, out: Path, *options: object) -> launch.Output:
    return launch.cli("convert", moe, out, "--num-experts", 16, *options)


def validation(config: Path, moe: Path, ranks: int = 1) -> float:
    layout = ("--expert-model-parallel-size", ranks)
    return launch.ranks(ranks, "pretrain", "--config", config, "--load", moe, *EVALUATE, *layout).validation


@pytest.fixture(scope="module")
def loss(unbroken: Trained, moe_config: Path) -> float:
    return validation(moe_config, unbroken[0])


@pytest.mark.parametrize(
    "options",
    [("--top-k", 4, "--router-noise", 0), ("--keep-function", "--allow-no-export")],
    ids=["twice the choices", "a group a copy"],
)
def test_the_function_is_kept(
    tmp_path: Path, unbroken: Trained, moe_config: Path, loss: float, options: tuple[object, ...]
) -> None:
    moe, grown = unbroken[0], tmp_path / "grown"
    said = grow(moe, grown, *options).ok().text
    assert "the optimizer starts afresh" in said
    assert ("convert again with a larger --router-noise" in said) == ("--router-noise" in options)
    assert validation(moe_config, grown, ranks=2) == pytest.approx(loss, rel=1e-5)
    assert not proof.run(proof.prepare(moe, grown))


def test_copies_of_one_expert_chosen_together_change_it(
    tmp_path: Path, unbroken: Trained, moe_config: Path, loss: float
) -> None:
    grown = tmp_path / "grown"
    said = grow(unbroken[0], grown).ok().text
    assert "the loss is above that of the model it was made of" in said
    assert validation(moe_config, grown) > loss * (1 + 1e-4)


def test_only_routers_are_written(tmp_path: Path, unbroken: Trained) -> None:
    grown = tmp_path / "grown"
    grow(unbroken[0], grown).ok()
    old, new = open_checkpoint(unbroken[0]), open_checkpoint(grown)
    record = manifest.read(grown)
    assert record is not None and new.args.num_experts == record["router"]["num_experts"] == 16
    written = sum(file["bytes"] for name, file in record["files"].items() if name.endswith(".distcp"))
    routers = new.tensors[ROUTER].nbytes
    states = new.objects["common_state/shard_0_1"].length
    assert routers < written < routers + states + LAYERS * 2000
    places = [
        {(root.iteration_dir / blob.file).stat().st_ino: blob.offset for blob in root.blobs(EXPERTS)}
        for root in (old, new)
    ]
    assert places[0] == places[1]
    assert new.tensors[EXPERTS].shape[1] == 16
    assert torch.equal(new.read_box(EXPERTS), old.read_box(EXPERTS).repeat(1, 2, 1, 1))


def test_transformers_computes_the_same(tmp_path: Path, unbroken: Trained) -> None:
    from transformers import AutoModelForCausalLM

    grow(unbroken[0], tmp_path / "grown", "--top-k", 4, "--router-noise", 0).ok()
    tokens = torch.arange(60).view(2, 30) * 7 % VOCABULARY
    logits = []
    for moe in (unbroken[0], tmp_path / "grown"):
        launch.cli("export-hf", moe, tmp_path / "hf", "--overwrite").ok()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        logits.append(model(tokens).logits)
    assert model.config.num_experts == 16 and model.config.num_experts_per_tok == 4
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Convert two dense models with random values to four experts, all different from each other or not."""
    for name, seed in (("dense", 0), ("a", 1), ("b", 2)):
        random = torch.Generator().manual_seed(seed)
        shapes = dense_checkpoint.tensors()
        values = {key: torch.randn(value.shape, generator=random) for key, value in shapes.items()}
        dense_checkpoint.write(tmp_path / name, values)
    dense_checkpoint.make_stats(tmp_path / "ks")

    def convert(*flags: object) -> Path:
        sources = ("--experts", tmp_path / "a", tmp_path / "b", "--key-stats", tmp_path / "ks")
        run("convert", tmp_path / "dense", tmp_path / "moe", *sources, "--num-experts", 4, *flags, "--quiet")
        return tmp_path / "moe"

    return convert


def run(*command: object, status: int = 0) -> None:
    assert cli.main([str(part) for part in command]) == status


KINDS: dict[str, tuple[object, ...]] = {
    "mixture": (),
    "two routers, top-k first": ("--num-routers", 2, "--no-moe-router-pre-softmax"),
    "linear, shards and a shared expert": ("--router", "linear", "--granularity", 2, "--shared-expert"),
    "linear, two layers": ("--router", "linear", "--layers", "0,2"),
    "real copies": ("--router", "linear", "--materialize"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_copies_of_the_chosen_experts_are_the_old_model(
    tmp_path: Path, small: Callable[..., Path], kind: str
) -> None:
    moe = small(*KINDS[kind])
    n, k = open_checkpoint(moe).args.num_experts, open_checkpoint(moe).args.moe_router_topk
    command = ("convert", moe, tmp_path / "grown", "--num-experts", 3 * n, "--top-k", 3 * k, "--quiet")
    run(*command, "--router-noise", 0)
    assert not proof.run(proof.prepare(moe, tmp_path / "grown"))
    made = []
    for root in (moe, tmp_path / "grown"):
        tensors = dense_checkpoint.read_back(root / "release")
        args = Namespace(**vars(open_checkpoint(root).args), pooling="sum")
        made.append(({key: value.double() for key, value in tensors.items()}, args))
    random = torch.Generator().manual_seed(0)
    for layer in range(dense_checkpoint.LAYERS):
        x = torch.randn(8, dense_checkpoint.HIDDEN, generator=random, dtype=torch.float64)
        old, new = (MegatronFFN(*one[:1], layer, one[1])(x[None]) for one in made)
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [8, 6])
def test_busiest_experts_get_more_copies(tmp_path: Path, small: Callable[..., Path], number: int) -> None:
    """Loads 0.6, 0.2, 0.15, 0.05: of four more, the first gets two (0.6, 0.3), the next one each."""
    moe = small("--router", "linear")
    load = [[0.6, 0.2, 0.15, 0.05], [0.05, 0.15, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]]
    for iteration in (1, 2):
        run_log.append(moe / "routing.jsonl", {"iteration": iteration, "layers": [0, 1, 2], "load": load})
    command = ("convert", moe, tmp_path / "grown", "--num-experts", number, "--duplicate", "load", "--quiet")
    run(*command, "--router-noise", 0)
    old, new = (dense_checkpoint.read_back(root / "release") for root in (moe, tmp_path / "grown"))
    wanted = [[0, 1, 2, 3, 0, 0, 1, 0], [0, 1, 2, 3, 3, 3, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]]
    for key in (EXPERTS, "decoder.layers.mlp.router.weight"):
        for layer, origins in enumerate(wanted):
            assert torch.equal(new[key][layer], old[key][layer][origins[:number]]), (key, layer)
    assert not proof.run(proof.prepare(moe, tmp_path / "grown"))


def test_noise_is_drawn_for_each_copy(tmp_path: Path, small: Callable[..., Path]) -> None:
    """As large as asked for over a row's root mean square; of a copy alike where the function is kept."""
    moe = small("--router", "linear", "--no-moe-router-pre-softmax")
    key = "decoder.layers.mlp.router.weight"
    old = dense_checkpoint.read_back(moe / "release")[key]
    for name, flags in (("free", ()), ("kept", ("--keep-function", "--allow-no-export"))):
        command = ("convert", moe, tmp_path / name, "--num-experts", 12, "--router-noise", 0.5, "--quiet")
        run(*command, *flags)
        new = dense_checkpoint.read_back(tmp_path / name / "release")[key]
        assert torch.equal(new[:, :4], old)
        noise = (new - old.repeat(1, 3, 1))[:, 4:]
        size = noise.square().mean().sqrt() / old.square().mean().sqrt()
        assert size == pytest.approx(0.5, rel=0.1)
        first = noise.unflatten(1, (2, 4))
        assert torch.allclose(first[:, :, :1].expand_as(first), first, atol=1e-6) == (name == "kept")
        assert not torch.allclose(first[:, 0], first[:, 1])
    args = open_checkpoint(tmp_path / "kept").args
    assert (args.moe_router_num_groups, args.moe_router_group_topk) == (3, 1)


def test_a_checkpoint_of_another_tool(tmp_path: Path, small: Callable[..., Path]) -> None:
    """Without a manifest: a linear router, as Megatron's arguments describe it."""
    moe = small("--router", "linear", "--layers", "1", "--shared-expert")
    (moe / manifest.NAME).unlink()
    run("convert", moe, tmp_path / "grown", "--num-experts", 8, "--quiet")
    record = manifest.read(tmp_path / "grown")
    assert record is not None and record["router"]["router"] == "linear"
    assert record["model"]["moe_layer_freq"] == "[0,1,0]"
    assert record["model"]["moe_shared_expert_intermediate_size"] == dense_checkpoint.FFN
    assert not proof.run(proof.prepare(moe, tmp_path / "grown"))


REFUSED: dict[str, tuple[tuple[object, ...], tuple[object, ...], str]] = {
    "fewer": ((), ("--num-experts", 4), "--num-experts 4: MOE .* has 4 experts; give a larger number"),
    "no multiple": ((), ("--num-experts", 6), "give a larger number that is a multiple of 4"),
    "a mixture": ((), ("--num-experts", 6, "--duplicate", "load"), "of 4 routers; give a multiple of 4"),
    "no number": ((), (), "has experts; give a larger number of them as --num-experts"),
    "no loads": ((), ("--num-experts", 8, "--duplicate", "load"), "has no loads of 3 layers and 4 experts"),
    "noise": ((), ("--num-experts", 8, "--router-noise", -1), "--router-noise -1.0: must be 0 or more"),
    "a dense model's flag": ((), ("--num-experts", 8, "--gate", "heads"), "--gate: .* has experts; leave it"),
    "several keys": (("--num-routers", 8), ("--num-experts", 8), "an expert has several keys in its router"),
    "no rows": (("--router", "locmoe"), ("--num-experts", 8), "an expert has no rows in its router"),
    "two ways": ((), ("--num-experts", 8, "--keep-function", "--top-k", 4), "--keep-function: is for"),
    "groups": ((), ("--num-experts", 8, "--keep-function"), "moe_router_num_groups 2 .*--allow-no-export"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_one_line(
    tmp_path: Path, small: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    made, flags, message = REFUSED[name]
    moe = small(*made, "--allow-no-export")
    run("convert", moe, tmp_path / "grown", *flags, status=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
    assert not (tmp_path / "grown").exists()


def test_a_dense_model_cannot_grow(
    tmp_path: Path, small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("convert", tmp_path / "dense", tmp_path / "grown", "--router-noise", 0.1, status=2)
    assert "--router-noise: " in (said := capsys.readouterr().err) and "has no experts" in said


def test_proof_finds_a_changed_row(tmp_path: Path, small: Callable[..., Path]) -> None:
    moe = small("--router", "linear")
    run("convert", moe, tmp_path / "grown", "--num-experts", 8, "--quiet")
    record = json.loads((tmp_path / "grown" / manifest.NAME).read_text())
    record["more_experts"]["router_noise"] = 0.2
    (tmp_path / "grown" / manifest.NAME).write_text(json.dumps(record))
    found = proof.run(proof.prepare(moe, tmp_path / "grown"))
    assert {one.check for one in found.found} == {"routers"}


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe-tied"])
def test_a_hugging_face_model_with_more_experts(tmp_path: Path, family: str) -> None:
    """In from transformers, four experts to eight, out again: the same logits."""
    hf_models.make(family, tmp_path / "in")
    run("import-hf", tmp_path / "in", tmp_path / "moe", "--quiet")
    command = ("convert", tmp_path / "moe", tmp_path / "grown", "--num-experts", 8, "--quiet")
    run(*command, "--top-k", 4, "--router-noise", 0)
    run("export-hf", tmp_path / "grown", tmp_path / "out", "--quiet")
    tokens = torch.arange(60).view(2, 30) * 7 % 250
    old, new = (hf_models.logits(tmp_path / name, tokens) for name in ("in", "out"))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    assert not proof.run(proof.prepare(tmp_path / "moe", tmp_path / "grown"))


def test_records_that_make_no_sense_are_one_line(
    tmp_path: Path, small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the model that should grow, and of one that has grown."""
    moe, grown = small("--router", "linear"), tmp_path / "grown"
    command = ("convert", moe, grown, "--num-experts", 8, "--quiet")

    def refused(root: Path, change: dict[str, Any], *command: object) -> None:
        whole = (root / manifest.NAME).read_text()
        (root / manifest.NAME).write_text(json.dumps(json.loads(whole) | change))
        run(*command, status=2)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        (root / manifest.NAME).write_text(whole)

    for change in (
        {"router": None},
        {"router": {"num_experts": 3}},
        {"model": 3},
        {"init": 7},
        {"format": 2},
    ):
        refused(moe, change, *command)
        assert not grown.exists()
    run(*command, "--duplicate", "even")
    made = json.loads((grown / manifest.NAME).read_text())["more_experts"]
    for more in (
        3, {}, made | {"num_experts": 10**12}, made | {"num_experts": "8"}, made | {"copies": [[0] * 8]},
        made | {"copies": [[9] * 8] * 3}, made | {"copies": [[[0]] * 8] * 3},
        made | {"copies": [[0.0] * 8] * 3},
        made | {"copies": 7}, made | {"router_noise": "much"},
        made | {"router_noise": None, "top_k": 99},
    ):  # fmt: skip
        refused(grown, {"more_experts": more}, "verify", moe, grown)
