"""``router-upcycle import-hf``, and back by ``export-hf``: what a model becomes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from megatron_router_upcycling.config import yaml_files
from megatron_router_upcycling.hf import safetensors_file
from tests import dense_checkpoint, hf_models
from tests.dense_checkpoint import assert_same
from tests.hf.folders import TOKENS, Capsys, copy, output, refused, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*hf_models.FAMILIES, *hf_models.MOES])
def test_import_and_export_are_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """With blocks so small that every tensor is cut, and in shards of another size than they came in."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 1 << 10)
    source = hf_models.make(family, tmp_path / "hf", dtype)
    assert run("import-hf", source, tmp_path / "dense") == 0
    assert run("export-hf", tmp_path / "dense", tmp_path / "back", "--max-shard-size", "70KB") == 0
    expected, back = hf_models.tensors(source), hf_models.tensors(tmp_path / "back")
    if family in hf_models.MOES and "tied" in family:  # see ``hf.export_job.outputs``
        assert torch.equal(back.pop("lm_head.weight"), back["model.embed_tokens.weight"])
    assert_same(back, expected)
    sizes = [path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 75_000  # with their headers
    entries, asked = (
        transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "back", source)
    )
    differs = {name for name in asked if entries.get(name) != asked[name]}
    same = (
        {"decoder_sparse_step", "mlp_only_layers"} if family == "qwen2-moe-tied" else set()
    )  # in other words
    assert differs <= {"_name_or_path", "max_window_layers", "transformers_version", *same}
    assert torch.equal(hf_models.logits(tmp_path / "back", TOKENS), hf_models.logits(source, TOKENS))


@pytest.mark.parametrize(("vocabulary", "rows"), [(250, 256), (256, 256), (257, 384)])
def test_vocabulary_is_padded_with_zeros(tmp_path: Path, vocabulary: int, rows: int) -> None:
    source = hf_models.make("qwen3", tmp_path / "hf", vocab_size=vocabulary)
    assert run("import-hf", source, tmp_path / "dense") == 0
    read = dense_checkpoint.read_back(tmp_path / "dense/release")
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert read[key].shape == (rows, 64) and not read[key][vocabulary:].any()
        assert torch.equal(read[key][:vocabulary], hf_models.tensors(source)[name])


def test_import_is_of_the_dtype_asked_for(models: Path, tmp_path: Path) -> None:
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        assert run("import-hf", models / "qwen2.5", tmp_path / name, "--dtype", name) == 0
        assert run("export-hf", tmp_path / name, tmp_path / f"back {name}") == 0
        expected = {key: value.to(dtype) for key, value in hf_models.tensors(models / "qwen2.5").items()}
        assert_same(hf_models.tensors(tmp_path / f"back {name}"), expected)
        flags = yaml.safe_load((tmp_path / name / "model.yaml").read_text())
        assert flags.get("bf16", False) == (name == "bfloat16")
    assert run("export-hf", tmp_path / "float32", tmp_path / "half", "--dtype", "float16") == 0
    assert_same(hf_models.tensors(tmp_path / "half"), hf_models.tensors(tmp_path / "back float16"))


def test_mixed_dtypes_need_a_choice(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    """As of the parts of one fused tensor."""
    source = copy(models, "qwen1.5", tmp_path / "hf")
    tensors = hf_models.tensors(source)
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = tensors[key].bfloat16()
    save_file(tensors, source / "model.safetensors")
    assert "choose one with --dtype" in refused(capsys, "import-hf", source, tmp_path / "dense")
    assert run("import-hf", source, tmp_path / "dense", "--dtype", "float32") == 0
    assert run("export-hf", tmp_path / "dense", tmp_path / "back") == 0
    assert_same(hf_models.tensors(tmp_path / "back"), {n: t.float() for n, t in tensors.items()})


def test_what_was_made_is_said(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    said = output(capsys, "import-hf", models / "qwen3", tmp_path / "dense")
    assert "qwen3 dense, 2 layers" in said and f"--config {tmp_path / 'dense/model.yaml'}" in said
    assert "--tokenizer-model TOKENIZER" in said
    flags = yaml_files.read_yaml(tmp_path / "dense/model.yaml")
    assert flags.pop("upcycling") == {} and "tokenizer_type" not in flags
    assert flags["kv_channels"] == 16 and flags["qk_layernorm"] and flags["rotary_base"] == 5000000
    assert flags["vocab_size"] == 250 and flags["padded_vocab_size"] == 256
    record = json.loads((tmp_path / "dense/import_hf.json").read_text())
    files = sorted(path.name for path in (models / "qwen3").glob("*.safetensors"))
    assert sorted(record["source"]["files"]) == files and len(files) == 7
    assert record["model"]["hidden_size"] == 64 and record["versions"]["torch"]
