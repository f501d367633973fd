"""Folders that transformers loads, other than it saves them: what import-hf makes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import hf_models
from tests.hf.folders import TOKENS, assert_equal, copy, edit, output, refused, run


def drop(path: Path, *entries: str, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in entries}))


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


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters", "top", "both"])
def test_rope_theta_is_found_where_transformers_finds_it(models: Path, tmp_path: Path, place: str) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    rope = {"rope_type": "default", "rope_theta": 5e6}
    changes = {
        "rope_scaling": {"rope_scaling": rope},
        "rope_parameters": {"rope_parameters": rope},
        "top": {"rope_theta": 5e6},
        "both": {"rope_scaling": rope, "rope_theta": 1e4},
    }[place]
    drop(source / "config.json", *({"rope_parameters", "rope_theta"} - changes.keys()), **changes)
    back = round_trip(source, tmp_path)
    assert json.loads((back / "config.json").read_text())["rope_theta"] == 5e6
    assert torch.equal(hf_models.logits(source, TOKENS), hf_models.logits(back, TOKENS))


def test_body_of_a_model_is_loaded(models: Path, tmp_path: Path) -> None:
    """As Qwen3-Embedding: names without ``model.``, and the embedding serves as the output layer."""
    source = copy(models, "qwen3-tied", tmp_path / "hf")
    expected = hf_models.tensors(source)
    rewrite(source, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    edit(source / "config.json", architectures=["Qwen3Model"])
    back = hf_models.tensors(round_trip(source, tmp_path))
    assert_equal({name: back[name] for name in expected}, expected)


def test_body_without_an_output_layer_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    rewrite(source, lambda tensors: {n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    said = refused(capsys, "import-hf", source, tmp_path / "dense")
    assert "has no tensor lm_head.weight" in said and "tie_word_embeddings" in said


def test_tied_model_may_have_been_saved_with_its_output_layer_only(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen2.5", tmp_path / "hf")
    expected = hf_models.tensors(source)
    embedding = "model.embed_tokens.weight"
    rewrite(source, lambda t: {"lm_head.weight" if n == embedding else n: v for n, v in t.items()})
    back = hf_models.tensors(round_trip(source, tmp_path))
    assert_equal({name: back[name] for name in expected}, expected)


def test_shards_without_their_index(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    (source / "model.safetensors.index.json").unlink()
    assert_equal(hf_models.tensors(round_trip(source, tmp_path)), hf_models.tensors(source))
    (source / "model-00002-of-00007.safetensors").unlink()
    said = refused(capsys, "import-hf", source, tmp_path / "again")
    assert "nor all of model-...-of-...safetensors" in said


def test_float64_becomes_float32(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen1.5", tmp_path / "hf")
    expected = hf_models.tensors(source)
    rewrite(source, lambda tensors: {name: value.double() for name, value in tensors.items()})
    assert_equal(hf_models.tensors(round_trip(source, tmp_path)), expected)


def test_switch_of_null_is_off(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    edit(source / "config.json", tie_word_embeddings=None)
    back = round_trip(source, tmp_path)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in {n for f in back.glob("*.safetensors") for n in load_file(f)}


def test_folders_that_hold_no_model_are_named_rightly(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(models, "qwen3", tmp_path / "models--Q/snapshots/abc")
    said = refused(capsys, "import-hf", tmp_path / "models--Q", tmp_path / "dense")
    assert f"name {source}" in said
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "run git lfs pull in" in refused(capsys, "import-hf", source, tmp_path / "dense")


def test_import_says_what_training_needs(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = output(capsys, "import-hf", models / "qwen3", tmp_path / "dense")
    assert "qwen3 dense, 2 layers" in said and f"--config {tmp_path / 'dense/model.yaml'}" in said
    assert "--tokenizer-model TOKENIZER" in said
