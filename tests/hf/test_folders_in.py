"""Folders that transformers loads, other than it saves them: what import-hf makes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests import hf_models
from tests.dense_checkpoint import assert_same
from tests.hf.folders import TOKENS, Capsys, copy, edit, refused, run


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Put other tensors into a folder, in one file."""
    tensors = change(hf_models.tensors(folder))
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def round_trip(source: Path, folder: Path) -> Path:
    assert run("import-hf", source, folder / "dense") == 0
    assert run("export-hf", folder / "dense", folder / "back") == 0
    return folder / "back"


EMBEDDING = "model.embed_tokens.weight"
CHANGES: dict[str, tuple[str, Callable[[str], str], Callable[[torch.Tensor], torch.Tensor]]] = {
    # As Qwen3-Embedding: names without ``model.``, and the embedding serves as the output layer.
    "body": ("qwen3-tied", lambda name: name.removeprefix("model."), lambda value: value),
    "tied, its output layer only": (
        "qwen2.5",
        lambda name: "lm_head.weight" if name == EMBEDDING else name,
        lambda value: value,
    ),
    "float64": ("qwen1.5", lambda name: name, torch.Tensor.double),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_names_and_dtypes(models: Path, tmp_path: Path, what: str) -> None:
    family, renamed, value_of = CHANGES[what]
    source = copy(models, family, tmp_path / "hf")
    expected = hf_models.tensors(source)
    rewrite(source, lambda tensors: {renamed(name): value_of(value) for name, value in tensors.items()})
    if what == "body":
        edit(source / "config.json", architectures=["Qwen3Model"])
    back = hf_models.tensors(round_trip(source, tmp_path))
    assert_same({name: back[name] for name in expected}, expected)


def test_experts_in_one_tensor_a_layer(models: Path, tmp_path: Path) -> None:
    """As transformers 5 saves them with ``save_original_format=False``."""
    hf_models.load(models / "qwen3-moe").save_pretrained(tmp_path / "hf", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in hf_models.tensors(tmp_path / "hf")
    empty = {"x.mlp.experts.down_proj": torch.empty(10**12, 0, 0)}  # no value, and so no name of an expert
    rewrite(tmp_path / "hf", lambda tensors: tensors | empty)
    back = round_trip(tmp_path / "hf", tmp_path)
    assert_same(hf_models.tensors(back), hf_models.tensors(models / "qwen3-moe"))


def without_shared_expert(
    tensors: dict[str, torch.Tensor], layers: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    names = tuple(
        f"layers.{layer}.mlp.shared_expert.{part}_proj.weight" for layer in layers for part in PARTS
    )
    return {name: value * 0 if name.endswith(names) else value for name, value in tensors.items()}


PARTS = ("gate", "up", "down")


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2)])
def test_a_shared_expert_of_zeros(models: Path, tmp_path: Path, layers: tuple[int, ...]) -> None:
    """Only one that is zeros in every layer is no expert in Megatron."""
    source = copy(models, "qwen2-moe", tmp_path / "hf")
    rewrite(source, lambda tensors: without_shared_expert(tensors, layers))
    expected, back = hf_models.tensors(source), hf_models.tensors(round_trip(source, tmp_path))
    flags = yaml.safe_load((tmp_path / "dense/model.yaml").read_text())
    kept = "moe_shared_expert_gate" in flags
    assert kept == ("moe_shared_expert_intermediate_size" in flags) == (len(layers) < 3)
    compared = [name for name in expected if kept or "shared_expert" not in name]
    assert_same({name: back[name] for name in compared}, {name: expected[name] for name in compared})
    found, asked = (hf_models.logits(folder, TOKENS) for folder in (tmp_path / "back", source))
    assert torch.equal(found, asked)


def test_a_shared_expert_of_no_width(tmp_path: Path) -> None:
    source = hf_models.make("qwen2-moe", tmp_path / "hf", shared_expert_intermediate_size=0)
    expected, back = hf_models.tensors(source), hf_models.tensors(round_trip(source, tmp_path))
    compared = [name for name in expected if "shared_expert" not in name]
    assert_same({name: back[name] for name in compared}, {name: expected[name] for name in compared})
    found, asked = (hf_models.logits(folder, TOKENS) for folder in (tmp_path / "back", source))
    assert torch.equal(found, asked)


def test_body_without_an_output_layer_is_refused(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    rewrite(source, lambda tensors: {n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    said = refused(capsys, "import-hf", source, tmp_path / "dense")
    assert "has no tensor lm_head.weight" in said and "tie_word_embeddings" in said


def test_shards_without_their_index(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    (source / "model.safetensors.index.json").unlink()
    assert_same(hf_models.tensors(round_trip(source, tmp_path)), hf_models.tensors(source))
    (source / "model-00002-of-00007.safetensors").unlink()
    said = refused(capsys, "import-hf", source, tmp_path / "again")
    assert "nor all of model-...-of-...safetensors" in said


def test_folders_that_hold_no_model_are_named_rightly(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    source = copy(models, "qwen3", tmp_path / "models--Q/snapshots/abc")
    said = refused(capsys, "import-hf", tmp_path / "models--Q", tmp_path / "dense")
    assert f"abc is of the hub's cache: name {source}" in said
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "run git lfs pull in" in refused(capsys, "import-hf", source, tmp_path / "dense")
    (source / "tokenizer.json").unlink()
    (source / "quantize_config.json").write_text("{}")
    rewrite(source, lambda tensors: {f"{name}.qweight": value for name, value in tensors.items()})
    said = refused(capsys, "import-hf", source, tmp_path / "dense")
    assert "has no tensor" in said and "quantize_config.json is of a quantised model (GPTQ" in said
    (source / "model.safetensors").rename(source / "model.gguf")
    assert "model.gguf is of a model in GGUF" in refused(capsys, "import-hf", source, tmp_path / "dense")
