"""Some layers with experts, finer experts, a shared expert: stock classes compute what Megatron computes.

Megatron's arithmetic (``tests/reference/megatron_ffn``) takes the place of the exported model's FFNs.
``test_megatron`` holds exports against Megatron itself.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.diagnostics.checkpoint import ROUTING
from tests import dense_checkpoint, hf_models
from tests.dense_checkpoint import FFN, HIDDEN, LAYERS
from tests.hf.folders import Capsys, dense_tensors, make_moe, refused, run, write_moe
from tests.reference.megatron_ffn import MegatronFFN

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % dense_checkpoint.VOCABULARY
QWEN2: dict[str, Any] = {}
QWEN3 = {"add_qkv_bias": False, "qk_layernorm": True}
TIED = {"untie_embeddings_and_output_weights": False}
LINEAR = ("--router", "linear", "--num-experts", 4)
TOP_K_FIRST = "--no-moe-router-pre-softmax"
CASES: dict[str, tuple[dict[str, Any], tuple[object, ...], tuple[str, ...]]] = {
    "some layers": (QWEN2, (*LINEAR, "--layers", "1"), ()),
    "some layers of a tied Qwen3": (QWEN3 | TIED, (*LINEAR, "--layers", "0,2", TOP_K_FIRST), ()),
    "finer experts": (QWEN2, (*LINEAR, "--granularity", 2), ()),
    "finer experts of a Qwen3": (QWEN3, ("--num-experts", 4, "--granularity", 3, TOP_K_FIRST), ()),
    "shared expert": (QWEN2, (*LINEAR, "--shared-expert"), ()),
    "shared expert, top-k first": (QWEN2 | TIED, (*LINEAR, "--shared-expert", TOP_K_FIRST), ()),
    "all three": (QWEN2, (*LINEAR, "--granularity", 2, "--shared-expert", "--layers", "0-1"), ()),
    "a mixture": (QWEN2, ("--num-experts", 4), ()),
    "two keys": (QWEN2, ("--num-experts", 2, "--num-routers", 4), ("--modelling-code",)),
    "all three, max pooling": (
        QWEN2,
        ("--num-experts", 4, "--pooling", "max", "--granularity", 2, "--shared-expert", "--layers", "1-2"),
        ("--modelling-code",),
    ),
}


def stored(moe: Path) -> tuple[dict[str, torch.Tensor], Namespace]:
    """A checkpoint's tensors and arguments."""
    checkpoint = open_checkpoint(moe)
    return dense_checkpoint.read_back(checkpoint.iteration_dir), checkpoint.args


def assert_as_megatron(moe: Path, exported: Path, pooling: str = "sum", **options: Any) -> torch.Tensor:
    """The exported model's logits, which are those with Megatron's arithmetic in place of its FFNs."""
    model = hf_models.load(exported, **options)
    tensors, args = stored(moe)
    args.pooling = pooling
    with torch.no_grad():
        found = model(TOKENS).logits
        for number, layer in enumerate(model.model.layers):
            layer.mlp = MegatronFFN(tensors, number, args)
        expected = model(TOKENS).logits
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-5
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_export_computes_what_megatron_does(tmp_path: Path, case: str) -> None:
    model, options, code = CASES[case]
    moe = make_moe(tmp_path, 7, *options, **model)
    assert run("export-hf", moe, tmp_path / "hf", *code) == 0
    pooling = "max" if "max" in options else "sum"
    assert_as_megatron(moe, tmp_path / "hf", pooling, trust_remote_code=bool(code))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [case for case, (_, _, code) in CASES.items() if not code])
def test_an_export_comes_back(tmp_path: Path, case: str, dtype: str) -> None:
    """Bit for bit, but for the router, which is then a linear one, and the factor of finer experts.

    Megatron's arguments say the same as well.
    """
    model, options, _ = CASES[case]
    moe = make_moe(tmp_path, 8, *options, **model)
    assert run("export-hf", moe, tmp_path / "hf", "--dtype", dtype) == 0
    assert run("import-hf", tmp_path / "hf", tmp_path / "back", "--make-vocab-size-divisible-by", 8) == 0
    (expected, trained), (found, args) = stored(moe), stored(tmp_path / "back")
    folded = {key for key in expected if key.endswith(("router.query_weight", "router.expert_key"))}
    gates = {key: value for key, value in found.items() if key.endswith("router.weight")}
    assert expected.keys() - folded == found.keys() - (gates if folded else {}).keys()
    for key in expected.keys() - folded:
        scale = trained.moe_router_topk_scaling_factor if ".experts.experts.linear_fc2" in key else None
        assert torch.equal(found[key], (expected[key] * (scale or 1.0)).to(found[key].dtype)), key
    exported = hf_models.tensors(tmp_path / "hf")
    rows = [value for key, value in sorted(exported.items()) if key.endswith("mlp.gate.weight")]
    assert torch.equal(torch.cat([gates[key].view(-1, HIDDEN) for key in sorted(gates)]), torch.cat(rows))
    for name in (*ROUTING, "moe_layer_freq", "moe_shared_expert_intermediate_size"):
        assert getattr(args, name) == getattr(trained, name), name
    assert not hasattr(args, "moe_shared_expert_gate") and not hasattr(args, "moe_grouped_gemm")


def test_tensors_and_entries_of_an_export(tmp_path: Path) -> None:
    """A scale of a power of two leaves every digit; layers without experts are plain FFNs."""
    moe = make_moe(tmp_path, 9, *LINEAR, "--granularity", 4, "--shared-expert", "--layers", "0,2")
    assert run("export-hf", moe, tmp_path / "hf") == 0
    source = stored(moe)[0]
    found = hf_models.tensors(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1], 1)
    assert (config["intermediate_size"], config["moe_intermediate_size"]) == (FFN, FFN // 4)
    assert (config["num_experts"], config["num_experts_per_tok"]) == (16, 8)
    assert config["norm_topk_prob"] is False
    assert config["shared_expert_intermediate_size"] == FFN
    for layer in (0, 2):
        own, prefix = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        experts = source[f"{own}.experts.experts.linear_fc2.weight"]
        for expert in range(16):
            name = f"{prefix}.experts.{expert}.down_proj.weight"
            assert torch.equal(found[name], 2 * experts[expert])  # 4 for shards, half beside the shared
            both = [found[name.replace("down", part)] for part in ("gate", "up")]
            assert torch.equal(torch.cat(both), source[f"{own}.experts.experts.linear_fc1.weight"][expert])
        shared = source[f"{own}.shared_experts.linear_fc2.weight"]
        assert torch.equal(found[f"{prefix}.shared_expert.down_proj.weight"], 2 * shared)
        gate = found[f"{prefix}.shared_expert_gate.weight"]
        hidden = 10 * torch.randn(100, HIDDEN)
        assert gate.all() and (hidden @ gate.t()).all()
        assert ((hidden @ gate.t()).sigmoid() == 0.5).all()
    up = source["decoder.layers.1.mlp.linear_fc1.weight"][FFN:]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], up)
    assert not [name for name in found if name.startswith("model.layers.1.mlp.") and "proj" not in name]
    card = (tmp_path / "hf/README.md").read_text()
    assert "softmax, then top-k" in card
    assert "Layers without experts (`mlp_only_layers`): 1." in card
    assert "scaled by 2 in training; the factor is in their `down_proj`, exactly." in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_factor_that_is_no_power_of_two_is_rounded_once(tmp_path: Path, dtype: str) -> None:
    moe = make_moe(tmp_path, 10, *LINEAR, "--granularity", 3)
    assert run("export-hf", moe, tmp_path / "hf", "--dtype", dtype) == 0
    source = stored(moe)[0]
    experts = 3 * source["decoder.layers.mlp.experts.experts.linear_fc2.weight"].double()
    found = hf_models.tensors(tmp_path / "hf")["model.layers.1.mlp.experts.5.down_proj.weight"]
    assert torch.equal(found, experts[1, 5].float().to(getattr(torch, dtype)))
    assert "rounded to the dtype of the weights" in (tmp_path / "hf/README.md").read_text()


def test_norms_as_transformer_engine_names_them(tmp_path: Path) -> None:
    """A layer with experts has the norm before them apart, one without has it with its projection."""
    tensors, args = stored(make_moe(tmp_path, 11, *LINEAR, "--layers", "1"))
    del tensors["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"]
    assert "decoder.layers.0.pre_mlp_layernorm.weight" not in tensors
    write_moe(tmp_path / "engine", tensors, args)
    for name in ("moe", "engine"):
        assert run("export-hf", tmp_path / name, tmp_path / f"hf {name}") == 0
    found, expected = (hf_models.tensors(tmp_path / f"hf {name}") for name in ("engine", "moe"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_layers_as_megatron_counts_them(tmp_path: Path) -> None:
    moe = make_moe(tmp_path, 12, *LINEAR, "--layers", "0,2")
    tensors, args = stored(moe)
    args.moe_layer_freq = 2
    write_moe(tmp_path / "other", tensors, args)
    (tmp_path / "other/router_upcycling.json").write_bytes((moe / "router_upcycling.json").read_bytes())
    assert run("export-hf", tmp_path / "other", tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["mlp_only_layers"] == [1]


def test_a_gate_that_training_gave_the_shared_expert(tmp_path: Path, capsys: Capsys) -> None:
    """``--moe-shared-expert-gate``: it is the class's own."""
    tensors, args = stored(make_moe(tmp_path, 13, *LINEAR, "--shared-expert"))
    gate = torch.randn(LAYERS, 1, HIDDEN)
    args.moe_shared_expert_gate = True
    name = "decoder.layers.mlp.shared_experts.gate_weight"
    write_moe(tmp_path / "gated", tensors | {name: gate}, args)
    assert run("export-hf", tmp_path / "gated", tmp_path / "hf") == 0
    assert_as_megatron(tmp_path / "gated", tmp_path / "hf")
    said = refused(capsys, "export-hf", tmp_path / "gated", tmp_path / "x", "--shared-expert-width", 16)
    assert f"left out where the model has a shared expert of its own (here of width {FFN})" in said


SPOILT: dict[str, tuple[Callable[[Any, dict[str, torch.Tensor]], object], str]] = {
    "other layers": (
        lambda args, tensors: setattr(args, "moe_layer_freq", [0, 1, 1]),
        "mlp.linear_fc1.weight is in layers 1 and should be in layers 0",
    ),
    "a layer too few": (lambda args, tensors: setattr(args, "moe_layer_freq", [0, 1]), "[0, 1] for 3 layers"),
    "no expert at all": (lambda args, tensors: setattr(args, "moe_layer_freq", [0] * 3), "[0, 0, 0] for 3"),
    "shared expert lost": (
        lambda args, tensors: tensors.pop("decoder.layers.2.mlp.shared_experts.linear_fc1.weight"),
        "shared_experts.linear_fc1.weight is in layers 0 and should be in layers 0, 2",
    ),
    "shared expert not known of": (
        lambda args, tensors: setattr(args, "moe_shared_expert_intermediate_size", None),
        "holds decoder.layers.mlp.shared_experts.linear_fc",
    ),
    "no number": (lambda args, tensors: setattr(args, "moe_router_topk_scaling_factor", "much"), "'much'"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_arguments_that_contradict_the_tensors(tmp_path: Path, capsys: Capsys, what: str) -> None:
    tensors, args = stored(make_moe(tmp_path, 14, *LINEAR, "--shared-expert", "--layers", "0,2"))
    spoil, message = SPOILT[what]
    spoil(args, tensors)
    write_moe(tmp_path / "spoilt", tensors, args)
    assert message in refused(capsys, "export-hf", tmp_path / "spoilt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_convert_says_that_no_qwen_has_no_class(tmp_path: Path, capsys: Capsys) -> None:
    args = dense_checkpoint.arguments(normalization="LayerNorm")
    dense_checkpoint.write(tmp_path / "dense", dense_tensors(args), args=args)
    command = ("convert", tmp_path / "dense", tmp_path / "moe", *LINEAR, "--shared-expert")
    assert cli.main([str(part) for part in command]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("not for Hugging Face: ") and "normalization 'LayerNorm'" in first


def test_convert_refuses_options_that_could_not_be_exported(tmp_path: Path, capsys: Capsys) -> None:
    args = dense_checkpoint.arguments(**QWEN3)
    dense_checkpoint.write(tmp_path / "dense", dense_tensors(args), args=args)
    command = ("convert", tmp_path / "dense", tmp_path / "moe", *LINEAR, "--shared-expert")
    said = refused(capsys, *command)
    assert "a Qwen3-MoE, which has no shared expert" in said
    assert said.startswith(f"error: DENSE {tmp_path / 'dense'}: ")
    assert said.rstrip().endswith("pass --allow-no-export")
    assert not (tmp_path / "moe").exists()
    assert run(*command, "--allow-no-export") == 0
    assert run("verify", tmp_path / "dense", tmp_path / "moe") == 0
