"""What vLLM, SGLang and llama.cpp want of an export beyond transformers, held without them.

``make test-engines`` runs the engines (tests/engines).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import dense_checkpoint, hf_models
from tests.hf.folders import Capsys, make_moe, output, run

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % dense_checkpoint.VOCABULARY
QWEN3 = {"add_qkv_bias": False, "qk_layernorm": True}
TIED = {"untie_embeddings_and_output_weights": False}
PRE, POST = "--moe-router-pre-softmax", "--no-moe-router-pre-softmax"


def with_tensors(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a folder in which tensors are replaced by others, or left out."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    assert changes.keys() <= tensors.keys()
    kept = {name: value for name, value in (tensors | changes).items() if value is not None}
    save_file(kept, target / "model.safetensors")
    return target


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_gate_of_a_shared_expert_of_zeros_is_not_zero(tmp_path: Path, dtype: str) -> None:
    """llama.cpp divides by its logit. What it weighs is zero: no bit of the logits depends on it."""
    moe = make_moe(tmp_path, 21, "--num-experts", 4)
    for name in ("hf", "again"):
        assert run("export-hf", moe, tmp_path / name, "--dtype", dtype) == 0
    found = hf_models.tensors(tmp_path / "hf")
    gates = {name: value for name, value in found.items() if name.endswith("shared_expert_gate.weight")}
    assert len(gates) == dense_checkpoint.LAYERS
    assert not any(value.any() for name, value in found.items() if ".shared_expert." in name)
    again = hf_models.tensors(tmp_path / "again")
    for name, gate in gates.items():
        assert gate.all() and gate.abs().max() < 0.1 and torch.equal(gate, again[name])
    first, second, _ = gates.values()
    assert not torch.equal(first, second)
    zeros = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    plain = with_tensors(tmp_path / "hf", tmp_path / "plain", **zeros)
    options = {"dtype": getattr(torch, dtype)}
    expected = hf_models.logits(plain, TOKENS, **options)
    assert torch.equal(hf_models.logits(tmp_path / "hf", TOKENS, **options), expected)


@pytest.mark.parametrize("family", [{}, QWEN3], ids=["Qwen2", "Qwen3"])
def test_a_tied_mixture_of_experts_has_its_output_layer_as_well(
    tmp_path: Path, family: dict[str, Any]
) -> None:
    moe = make_moe(tmp_path, 22, "--num-experts", 4, **family, **TIED)
    assert run("export-hf", moe, tmp_path / "hf") == 0
    found = hf_models.tensors(tmp_path / "hf")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is True
    model = hf_models.load(tmp_path / "hf")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    without = with_tensors(tmp_path / "hf", tmp_path / "without", **{"lm_head.weight": None})
    assert torch.equal(model(TOKENS).logits, hf_models.logits(without, TOKENS))
    assert run("export-hf", moe, tmp_path / "shards", "--max-shard-size", "10KB") == 0
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())


ALWAYS = "llama.cpp computes another model: it always renormalises the chosen experts' weights in Qwen3-MoE"
NEVER = "llama.cpp computes another model: it never renormalises the chosen experts' weights in Qwen2-MoE"
# The model, options of convert, options of export-hf, and what is said.
LINES: dict[str, tuple[dict[str, Any], tuple[object, ...], tuple[object, ...], str | None]] = {
    "Qwen2, softmax first": ({}, (PRE,), (), None),
    "Qwen2, top-k first": ({}, (POST,), (), f"{NEVER}, and this one routes by top-k, then softmax"),
    "Qwen3, softmax first": (QWEN3, (PRE,), (), f"{ALWAYS}, and this one routes by softmax, then top-k"),
    "Qwen3, top-k first": (QWEN3, (POST,), (), None),
    "Qwen3, all experts": (QWEN3, (PRE, "--top-k", 4), (), None),
    "some layers": ({}, (PRE, "--layers", "1"), (), "it wants experts in every layer of Qwen2-MoE"),
    "no shared expert": (
        {},
        (PRE,),
        ("--shared-expert-width", 0),
        "load this model: it wants a shared expert",
    ),
}


@pytest.mark.parametrize("what", LINES)
def test_what_llama_cpp_would_make_of_it_is_said(tmp_path: Path, capsys: Capsys, what: str) -> None:
    family, options, asked, line = LINES[what]
    moe = make_moe(tmp_path, 23, "--num-experts", 4, *options, **family)
    said = output(capsys, "export-hf", moe, tmp_path / "hf", *asked)
    card = (tmp_path / "hf/README.md").read_text()
    assert ("mbridge" in card) == (line is not None and not asked)
    if line is None:
        assert "llama.cpp" not in said + card
    else:
        assert sum(line in printed for printed in said.splitlines()) == 1
        assert line in card
