"""What ``import-hf`` and ``export-hf`` refuse, in one line and before anything is left on the disk."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_router_upcycling.config import manifest
from tests import dense_checkpoint, hf_models
from tests.dense_checkpoint import assert_same
from tests.hf.folders import Capsys, copy, edit, make_moe, refused, run


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors.pop(name, torch.zeros(2)))
        save_file(tensors | ({} if changed is None else {name: changed}), path)

    return apply


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.flatten()[-1] = torch.nan
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"
SHARED = "model.layers.2.mlp.shared_expert.down_proj.weight"
EXPERT, GATE = "model.layers.2.mlp.experts.1.down_proj.weight", "model.layers.0.mlp.gate.weight"
INDEX = "model.safetensors.index.json"


def nan_among_zeros(folder: Path) -> None:
    """In a shared expert that would otherwise count as none."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".shared_expert." in name:
            tensors[name].zero_()
    with_nan(tensors[SHARED])
    save_file(tensors, folder / "model.safetensors")


def with_index(**files: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map=names | files)

    return apply


def twice(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00006.safetensors", folder / "more.safetensors")
    with_index(more="more.safetensors")(folder)


BAD_FOLDERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("qwen1.5", lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config no JSON": ("qwen1.5", lambda f: (f / "config.json").write_text("{"), "not a JSON object"),
    "config too deep": ("qwen1.5", lambda f: (f / "config.json").write_text('{"x":' * 10**5), "not a JSON"),
    "config a list": ("qwen1.5", lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": ("qwen1.5", lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetens"),
    "cut short": ("qwen1.5", lambda f: os.truncate(f / "model.safetensors", 500), "cut short"),
    "wider than config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", intermediate_size=95),
        r"gate_proj.weight is \[96, 64\] where config.json gives \[95, 64\]",
    ),
    "more layers in config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", num_hidden_layers=10**9),
        "has no tensor model.layers.2",
    ),
    "fewer layers in config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", num_hidden_layers=1),
        r"model.layers.1.* is in no qwen2 model of this config.json",
    ),
    "missing tensor": ("qwen1.5", set_tensor(UP, lambda t: None), f"has no tensor {UP}"),
    "extra tensor": ("qwen1.5", set_tensor("extra", lambda t: t), "extra is in no qwen2 model"),
    "missing expert": ("qwen3-moe", set_tensor(EXPERT, lambda t: None), f"has no tensor {EXPERT}, which"),
    "another expert's width": (
        "qwen3-moe",
        set_tensor(EXPERT, lambda t: t[:, 1:].contiguous()),
        rf"{EXPERT} is \[64, 23\] where config.json gives \[64, 24\]",
    ),
    "quantised expert": ("qwen3-moe", set_tensor(EXPERT, lambda t: t.char()), f"{EXPERT} is I8, perhaps"),
    "more experts in config": (
        "qwen3-moe",
        lambda f: edit(f / "config.json", num_local_experts=10**12),
        "has no tensor model.layers.0.mlp.experts.4.gate_proj.weight",
    ),
    "fewer experts in config": (
        "qwen3-moe",
        lambda f: edit(f / "config.json", num_local_experts=3),
        r"experts.3.\w+.weight is in no qwen3 model of this config.json",
    ),
    "NaN among zeros": ("qwen2-moe", nan_among_zeros, f"{SHARED}: holds NaN or infinite values"),
    "missing router": ("qwen3-moe", set_tensor(GATE, lambda t: None), f"has no tensor {GATE}"),
    "experts stacked, one twice": (
        "qwen3-moe",
        set_tensor("model.layers.1.mlp.experts.down_proj", lambda t: torch.ones(4, 64, 24)),
        "holds model.layers.1.mlp.experts.0.down_proj.weight, which",
    ),
    "experts stacked, in odd rows": (
        "qwen3-moe",
        set_tensor("model.layers.1.mlp.experts.gate_up_proj", lambda t: torch.ones(4, 49, 64)),
        "layers.1.mlp.experts.gate_up_proj is in no qwen3 model",
    ),
    "quantised": ("qwen1.5", set_tensor(UP, lambda t: t.to(torch.int8)), f"{UP} is I8, perhaps quantised"),
    "NaN": ("qwen1.5", set_tensor(UP, with_nan), f"{UP}: holds NaN or infinite values"),
    "another head": (
        "qwen3-tied",
        set_tensor("lm_head.weight", lambda t: torch.ones(250, 64)),
        "lm_head.weight differs from model.embed_tokens.weight though config.json ties them",
    ),
    "missing shard": (
        "qwen2.5",
        lambda f: min(f.glob("*.safetensors")).unlink(),
        "model-00001-of-00006.safetensors: cannot be read",
    ),
    "shard outside": ("qwen2.5", with_index(x="../x.safetensors"), "names no files of this folder"),
    "index of nothing": ("qwen2.5", lambda f: edit(f / INDEX, weight_map={}), "names no files of this"),
    "index of numbers": ("qwen2.5", with_index(x=1), "names no files of this folder"),
    "tensor twice": ("qwen2.5", twice, "holds model.embed_tokens.weight, which .*-00001-of-.* has"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(models: Path, tmp_path: Path, capsys: Capsys, what: str) -> None:
    family, spoil, message = BAD_FOLDERS[what]
    source = copy(models, family, tmp_path / "hf")
    spoil(source)
    said = refused(capsys, "import-hf", source, tmp_path / "made/dense")

    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_was_not_made_here_is_not_replaced(
    models: Path, tmp_path: Path, capsys: Capsys
) -> None:
    source = copy(models, "qwen3-tied", tmp_path / "hf")
    dense, back = tmp_path / "dense", tmp_path / "back"
    assert run("import-hf", source, dense) == 0 and run("export-hf", dense, back) == 0
    assert "exists; pass --overwrite" in refused(capsys, "import-hf", source, dense)
    assert run("import-hf", source, dense, "--overwrite") == 0
    assert run("export-hf", dense, back, "--overwrite") == 0
    assert "holds no import_hf.json" in refused(capsys, "import-hf", source, back, "--overwrite")
    assert "holds no export_hf.json" in refused(capsys, "export-hf", dense, source, "--overwrite")
    assert "lies in HF_DIR" in refused(capsys, "import-hf", source, source / "dense")
    assert "no such folder" in refused(capsys, "import-hf", tmp_path / "none", tmp_path / "new")
    assert_same(hf_models.tensors(back), hf_models.tensors(source))


def test_bad_flags_of_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.chdir(tmp_path)
    dense_checkpoint.write(tmp_path / "dense", args=dense_checkpoint.arguments(max_position_embeddings=16))
    for flag, value, message in (
        ("--max-shard-size", "5", "argument --max-shard-size: '5' is no size; write it as 5GB"),
        ("--max-shard-size", "0MB", "'0MB' is no size"),
        ("--shared-expert-width", "-1", "--shared-expert-width -1: must be 0 or more"),
        ("--tokenizer", ".", "--tokenizer .: holds none of tokenizer.json"),
        ("--dtype", "int8", "argument --dtype: invalid choice: 'int8'"),
    ):
        assert message in refused(capsys, "export-hf", "dense", "hf", flag, value)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]


NORM, FC2 = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"
BAD_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    f"has no tensor {NORM}": lambda tensors: tensors.pop(NORM),
    "holds decoder.other, which has": lambda tensors: tensors.update({"decoder.other": torch.ones(2)}),
    r"output_layer.weight is \[41, 32\] where the training arguments give \[40, 32\]": lambda tensors: (
        tensors.update({"output_layer.weight": torch.ones(41, 32)})
    ),
    f"{FC2}: holds NaN or infinite values": lambda tensors: with_nan(tensors[FC2]),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_bad_checkpoint_is_not_exported(tmp_path: Path, capsys: Capsys, message: str) -> None:
    tensors = dense_checkpoint.tensors()
    BAD_TENSORS[message](tensors)
    args = dense_checkpoint.arguments(max_position_embeddings=16)
    dense_checkpoint.write(tmp_path / "dense", tensors, args=args)
    assert re.search(message, refused(capsys, "export-hf", tmp_path / "dense", tmp_path / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_no_class_holds_and_a_manifest_that_contradicts_it(tmp_path: Path, capsys: Capsys) -> None:
    moe = make_moe(tmp_path, 6, "--num-experts", 4, "--pooling", "max")
    said = refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert "takes the maximum over routers (--pooling max)" in said and "--modelling-code" in said
    edit(moe / manifest.NAME, router=json.loads((moe / manifest.NAME).read_text())["router"] | {"top_k": 1})
    said = refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert "top_k 1, but the model was trained with 2" in said
    assert not (tmp_path / "hf").exists()
