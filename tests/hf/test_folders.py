"""``router-upcycle import-hf`` and ``export-hf`` as commands: there and back, what they refuse and leave."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest, yaml_files
from megatron_router_upcycling.hf import values
from megatron_router_upcycling.hf.safetensors_file import SafetensorsFile
from tests import dense_checkpoint, hf_models, legacy_checkpoint
from tests.dense_checkpoint import make_stats

TOKENS = torch.arange(24)[None] * 11 % 250


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face folder for each family, in float32."""
    folder = tmp_path_factory.mktemp("models")
    for family in hf_models.FAMILIES:
        hf_models.make(family, folder / family)
    return folder


def run(*args: object) -> int:
    return cli.main([*map(str, args), "--quiet"])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command says of a mistake."""
    capsys.readouterr()
    assert run(*args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(models: Path, family: str, target: Path) -> Path:
    shutil.copytree(models / family, target)
    return target


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit; NaN and signed zeros would count too."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_import_and_export_are_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """With blocks so small that every tensor is cut, and in shards of another size than they came in."""
    monkeypatch.setattr(values, "BLOCK_BYTES", 1 << 10)
    source = hf_models.make(family, tmp_path / "hf", dtype)
    assert run("import-hf", source, tmp_path / "dense") == 0
    assert run("export-hf", tmp_path / "dense", tmp_path / "back", "--max-shard-size", "70KB") == 0
    assert_equal(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    found, expected = (
        transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "back", source)
    )
    differs = {name for name in expected if found.get(name) != expected[name]}
    assert differs <= {"_name_or_path", "max_window_layers", "transformers_version"}
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
    assert run("export-hf", tmp_path / "dense", tmp_path / "back") == 0
    assert_equal(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source))


def test_import_is_of_the_dtype_asked_for(models: Path, tmp_path: Path) -> None:
    for name, dtype in values.DTYPES.items():
        assert run("import-hf", models / "qwen2.5", tmp_path / name, "--dtype", name) == 0
        assert run("export-hf", tmp_path / name, tmp_path / f"back {name}") == 0
        expected = {key: value.to(dtype) for key, value in hf_models.tensors(models / "qwen2.5").items()}
        assert_equal(hf_models.tensors(tmp_path / f"back {name}"), expected)
        flags = yaml.safe_load((tmp_path / name / "model.yaml").read_text())
        assert flags.get("bf16", False) == (name == "bfloat16")
    assert run("export-hf", tmp_path / "float32", tmp_path / "half", "--dtype", "float16") == 0
    assert_equal(hf_models.tensors(tmp_path / "half"), hf_models.tensors(tmp_path / "back float16"))


def test_mixed_dtypes_need_a_choice(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of the parts of one fused tensor."""
    source = copy(models, "qwen1.5", tmp_path / "hf")
    tensors = hf_models.tensors(source)
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = tensors[key].bfloat16()
    save_file(tensors, source / "model.safetensors")
    assert "choose one with --dtype" in refused(capsys, "import-hf", source, tmp_path / "dense")
    assert run("import-hf", source, tmp_path / "dense", "--dtype", "float32") == 0
    assert run("export-hf", tmp_path / "dense", tmp_path / "back") == 0
    assert_equal(hf_models.tensors(tmp_path / "back"), {n: t.float() for n, t in tensors.items()})


def test_a_checkpoint_saved_at_tensor_parallel_2_by_transformer_engine_or_in_legacy_format(
    tmp_path: Path,
) -> None:
    """Chunks of rows and of columns, gate and up apart; the norm under its other name."""
    tensors = dense_checkpoint.tensors()
    args = dense_checkpoint.arguments(max_position_embeddings=16, vocab_size=37)
    dense_checkpoint.write(tmp_path / "one", tensors, args=args)
    assert run("export-hf", tmp_path / "one", tmp_path / "hf one") == 0
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    renamed = tensors | {"decoder.layers.pre_mlp_layernorm.weight": tensors[norm]}
    del renamed[norm]
    dense_checkpoint.write(tmp_path / "two", renamed, tensor_parallel=2, optimizer=True, args=args)
    assert run("export-hf", tmp_path / "two", tmp_path / "hf two") == 0
    found = hf_models.tensors(tmp_path / "hf two")
    assert_equal(found, hf_models.tensors(tmp_path / "hf one"))

    legacy_checkpoint.write(tmp_path / "legacy", tensors, tensor_parallel=2, stages=((0,), (1, 2)), args=args)
    assert run("export-hf", tmp_path / "legacy", tmp_path / "hf legacy") == 0
    assert_equal(hf_models.tensors(tmp_path / "hf legacy"), found)

    H, G, d = dense_checkpoint.HEADS, dense_checkpoint.GROUPS, dense_checkpoint.HEAD_DIM
    fused = tensors["decoder.layers.self_attention.linear_qkv.weight"]
    for layer in range(dense_checkpoint.LAYERS):
        for group in range(G):
            block = fused[layer, group * (H // G + 2) * d :][: (H // G + 2) * d]
            prefix = f"model.layers.{layer}.self_attn"
            queries = found[f"{prefix}.q_proj.weight"][group * (H // G) * d :][: (H // G) * d]
            assert torch.equal(queries, block[: -2 * d])
            assert torch.equal(found[f"{prefix}.k_proj.weight"][group * d :][:d], block[-2 * d : -d])
            assert torch.equal(found[f"{prefix}.v_proj.weight"][group * d :][:d], block[-d:])
    assert found["lm_head.weight"].shape == (37, dense_checkpoint.HIDDEN)


def test_layers_under_keys_of_their_own(tmp_path: Path) -> None:
    """As Megatron stores them where they may be unlike, here alike all the same."""
    args = dense_checkpoint.arguments(max_position_embeddings=16)
    tensors = dense_checkpoint.write(tmp_path / "stacked", args=args)
    apart = dense_checkpoint.Folder(tmp_path / "apart/iter_0000008")
    for key, value in tensors.items():
        if key.startswith("decoder.layers."):
            for layer in range(dense_checkpoint.LAYERS):
                own = key.replace("layers.", f"layers.{layer}.", 1)
                apart.add(own, value[layer], (1,) * (value.dim() - 1))
        else:
            apart.add(key, value, (1,) * value.dim())
    apart.add_object("common_state/shard_0_1", {"args": args})
    apart.finish()
    (tmp_path / "apart/latest_checkpointed_iteration.txt").write_text("8")
    for name in ("stacked", "apart"):
        assert run("export-hf", tmp_path / name, tmp_path / f"hf {name}") == 0
    assert_equal(hf_models.tensors(tmp_path / "hf apart"), hf_models.tensors(tmp_path / "hf stacked"))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


def test_tokenizer_and_special_tokens_go_along(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen2.5", tmp_path / "hf")
    write_tokenizer(source)
    edit(source / "config.json", eos_token_id=1)
    edit(source / "generation_config.json", eos_token_id=[1, 2], temperature=0.7, do_sample=True)
    assert run("import-hf", source, tmp_path / "dense") == 0
    flags = yaml_files.read_yaml(tmp_path / "dense/model.yaml")
    assert flags["tokenizer_type"] == "HuggingFaceTokenizer"
    assert flags["tokenizer_model"] == str(tmp_path / "dense/tokenizer")
    assert open_checkpoint(tmp_path / "dense").args.tokenizer_model == flags["tokenizer_model"]

    assert run("convert", tmp_path / "dense", tmp_path / "moe", "--router", "linear") == 0
    assert run("export-hf", tmp_path / "moe", tmp_path / "back") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("b a").input_ids == [3, 2] and tokenizer.eos_token == "<eos>"
    model = hf_models.load(tmp_path / "back")
    assert model.config.eos_token_id == 1 and model.generation_config.eos_token_id == [1, 2]
    assert model.generation_config.temperature == 0.7
    assert run("export-hf", tmp_path / "moe", tmp_path / "named", "--tokenizer", source) == 0
    assert (tmp_path / "named/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_yaml_and_the_record_say_what_was_made(models: Path, tmp_path: Path) -> None:
    assert run("import-hf", models / "qwen3", tmp_path / "dense") == 0
    flags = yaml_files.read_yaml(tmp_path / "dense/model.yaml")
    assert flags.pop("upcycling") == {} and "tokenizer_type" not in flags
    assert flags["kv_channels"] == 16 and flags["qk_layernorm"] and flags["rotary_base"] == 5000000
    assert flags["vocab_size"] == 250 and flags["padded_vocab_size"] == 256
    record = json.loads((tmp_path / "dense/import_hf.json").read_text())
    files = sorted(path.name for path in (models / "qwen3").glob("*.safetensors"))
    assert sorted(record["source"]["files"]) == files and len(files) == 7
    assert record["model"]["hidden_size"] == 64 and record["versions"]["torch"]


def test_the_digest_of_a_file_sees_its_values(tmp_path: Path) -> None:
    def digest() -> str:
        with SafetensorsFile(tmp_path / "file") as file:
            return file.sample_digest()

    save_file({"x": torch.zeros(1000)}, tmp_path / "file")
    before = digest()
    save_file({"x": torch.ones(1000)}, tmp_path / "file")
    assert digest() != before
    save_file({"x": torch.zeros(1000)}, tmp_path / "file")
    assert digest() == before


def make_moe(folder: Path, seed: int, *options: object, **changes: Any) -> Path:
    """A converted checkpoint whose every value is then drawn at random, experts apart, one rank's chunks."""
    dense_checkpoint.write(
        folder / "dense", args=dense_checkpoint.arguments(max_position_embeddings=16, **changes)
    )
    make_stats(folder / "ks")
    assert run("convert", folder / "dense", folder / "upcycled", "--key-stats", folder / "ks", *options) == 0
    upcycled = open_checkpoint(folder / "upcycled")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(value.shape, generator=generator) * 0.3
        for key, value in dense_checkpoint.read_back(upcycled.iteration_dir).items()
    }
    tensors["decoder.layers.pre_mlp_layernorm.weight"] = tensors[
        "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    ]
    dense_checkpoint.write(folder / "moe", tensors, args=upcycled.args, extra_states=False)
    manifest.write(folder / "moe", manifest.read(folder / "upcycled") or {})
    return folder / "moe"


def scores_by_loops(tensors: dict[str, torch.Tensor], layer: int, pooling: str) -> torch.Tensor:
    """A matrix for each router and expert key, [m, n*c, D], folded by loops in float64."""
    query = tensors["decoder.layers.mlp.router.query_weight"][layer].double()
    key = tensors["decoder.layers.mlp.router.expert_key"][layer].double()
    folded = torch.zeros(query.shape[0], key.shape[0], query.shape[2], dtype=torch.float64)
    for j in range(query.shape[0]):
        for i in range(key.shape[0]):
            for r in range(query.shape[1]):
                folded[j, i] += key[i, r] * query[j, r] / query.shape[1] ** 0.5
    return folded.sum(0, keepdim=True) if pooling == "sum" else folded


@pytest.mark.parametrize(
    ("options", "pooling", "code"),
    [
        (("--num-experts", 4), "sum", ()),
        (("--num-experts", 4, "--pooling", "max"), "max", ("--modelling-code",)),
        (("--num-experts", 2, "--num-routers", 4), "sum", ("--modelling-code",)),
    ],
    ids=["sum", "max", "two keys"],
)
def test_gates_and_experts_of_an_export(
    tmp_path: Path, options: tuple[object, ...], pooling: str, code: tuple[str, ...]
) -> None:
    moe = make_moe(tmp_path, 1, *options)
    assert run("export-hf", moe, tmp_path / "hf", *code) == 0
    source = dense_checkpoint.read_back(open_checkpoint(moe).iteration_dir)
    found = hf_models.tensors(tmp_path / "hf")
    F = dense_checkpoint.FFN
    for layer in range(dense_checkpoint.LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        gate = scores_by_loops(source, layer, pooling).flatten(0, 1)
        torch.testing.assert_close(found[f"{prefix}.gate.weight"].double(), gate, rtol=0, atol=2e-6)
        fc1, fc2 = (source[f"decoder.layers.mlp.experts.experts.linear_fc{i}.weight"][layer] for i in (1, 2))
        for expert in range(options[1]):
            name = f"{prefix}.experts.{expert}"
            assert torch.equal(found[f"{name}.gate_proj.weight"], fc1[expert, :F])
            assert torch.equal(found[f"{name}.up_proj.weight"], fc1[expert, F:])
            assert torch.equal(found[f"{name}.down_proj.weight"], fc2[expert])
        for name, tensor in found.items():
            if f"{prefix}.shared_expert" in name:
                assert not tensor.any()
    hf_models.load(tmp_path / "hf", trust_remote_code=bool(code))


def test_an_mlp_router_is_exported_with_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = make_moe(tmp_path, 5, "--num-experts", 4, "--router", "mlp")
    said = refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert "has a hidden layer (--router mlp)" in said and "--modelling-code" in said
    assert run("export-hf", moe, tmp_path / "hf", "--modelling-code") == 0
    source = dense_checkpoint.read_back(open_checkpoint(moe).iteration_dir)
    model = hf_models.load(tmp_path / "hf", trust_remote_code=True)
    seen = torch.randn(8, dense_checkpoint.HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer in range(dense_checkpoint.LAYERS):
        fc1, fc2 = (source[f"decoder.layers.mlp.router.fc{i}.weight"][layer].double() for i in (1, 2))
        inner = seen.double() @ fc1.t()
        expected = (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ fc2.t()
        logits, scores, chosen = model.model.layers[layer].mlp.gate(seen)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            scores.double(), expected.softmax(1).gather(1, chosen), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("order", ["--moe-router-pre-softmax", "--no-moe-router-pre-softmax"])
def test_the_order_of_softmax_and_top_k(tmp_path: Path, order: str) -> None:
    moe = make_moe(tmp_path, 2, "--num-experts", 4, order)
    assert run("export-hf", moe, tmp_path / "hf") == 0
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    assert settings["norm_topk_prob"] == order.startswith("--no-")
    card = (tmp_path / "hf/README.md").read_text()
    assert ("top-k, then softmax" in card) == order.startswith("--no-")
    assert (settings["num_experts"], settings["num_experts_per_tok"]) == (4, 2)


def test_equal_experts_are_the_dense_model(models: Path, tmp_path: Path) -> None:
    """A converted Mixture-of-Experts, top-k before softmax, whose experts share their bytes."""
    assert run("import-hf", models / "qwen3", tmp_path / "dense") == 0
    options = ("--router", "linear", "--num-experts", 4, "--no-moe-router-pre-softmax")
    assert run("convert", tmp_path / "dense", tmp_path / "moe", *options) == 0
    assert run("export-hf", tmp_path / "moe", tmp_path / "hf", "--max-shard-size", "100KB") == 0
    found, expected = (hf_models.logits(folder, TOKENS) for folder in (tmp_path / "hf", models / "qwen3"))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("width", [0, 16])
def test_width_of_the_shared_expert(tmp_path: Path, width: int) -> None:
    moe = make_moe(tmp_path, 3, "--num-experts", 4)
    assert run("export-hf", moe, tmp_path / "hf", "--shared-expert-width", width) == 0
    found = hf_models.tensors(tmp_path / "hf")
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"
    assert (name in found) == bool(width) and (not width or found[name].shape == (32, width))
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_what_stock_classes_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = make_moe(tmp_path, 4, "--num-experts", 4, "--pooling", "max")
    said = refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert "maximum over routers (--pooling max)" in said and "--modelling-code" in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--granularity", 2, "--top-k", 2), "trained with moe_router_topk_scaling_factor 2.0"),
        (("--shared-expert",), "trained with moe_router_topk_scaling_factor 0.5"),
        (("--layers", "0,2"), "trained with moe_layer_freq"),
    ],
    ids=["granularity", "shared expert", "layers"],
)
def test_experts_of_another_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    dense_checkpoint.write(tmp_path / "dense", args=dense_checkpoint.arguments(max_position_embeddings=16))
    make = ("convert", tmp_path / "dense", tmp_path / "moe", "--router", "linear", *options)
    assert run(*make) == 0
    assert message in refused(capsys, "export-hf", tmp_path / "moe", tmp_path / "hf")


def test_the_card_and_the_record_tell_of_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = make_moe(tmp_path, 5, "--num-experts", 4)
    assert cli.main(["export-hf", str(moe), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    record = json.loads((tmp_path / "hf/export_hf.json").read_text())
    rounding = record["rounding"]
    assert rounding["choices"] == 3 * 1024 * 2 and 0 < rounding["by_rounding"] < 200
    said = f"changes {rounding['by_rounding']} of {rounding['choices']} top-k choices"
    assert said in capsys.readouterr().out and said in (tmp_path / "hf/README.md").read_text()
    assert record["source"]["digest"] == open_checkpoint(moe).digest()
    assert str(tmp_path) not in (tmp_path / "hf/README.md").read_text()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


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


def with_header(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_FOLDERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("qwen1.5", lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config no JSON": ("qwen1.5", lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config a list": ("qwen1.5", lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "MoE": ("qwen1.5", lambda f: edit(f / "config.json", num_experts=8), "is a Mixture-of-Experts"),
    "Llama": ("qwen1.5", lambda f: edit(f / "config.json", model_type="llama"), "is not covered"),
    "no weights": ("qwen1.5", lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetens"),
    "cut short": ("qwen1.5", cut_short, "model.safetensors: cut short"),
    "empty": ("qwen1.5", with_header(b""), "model.safetensors: cut short"),
    "half a header": ("qwen1.5", with_header(struct.pack("<Q", 99) + b"{"), "cut short"),
    "no header": ("qwen1.5", with_header(b"\xff" * 64), "not a safetensors file"),
    "header a list": ("qwen1.5", with_header(struct.pack("<Q", 2) + b"[]"), "not a safetensors file"),
    "wider than config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", intermediate_size=95),
        r"down_proj.weight is \[64, 96\] where config.json gives \[64, 95\]",
    ),
    "more layers in config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", num_hidden_layers=10**9),
        "has no tensor model.layers.2",
    ),
    "fewer layers in config": (
        "qwen1.5",
        lambda f: edit(f / "config.json", num_hidden_layers=1),
        "holds model.layers.1",
    ),
    "missing tensor": ("qwen1.5", set_tensor(UP, lambda t: None), f"has no tensor {UP}"),
    "extra tensor": ("qwen1.5", set_tensor("extra", lambda t: t), "holds extra, which no qwen2 model"),
    "quantised": ("qwen1.5", set_tensor(UP, lambda t: t.to(torch.int8)), f"{UP} is I8, perhaps quantised"),
    "NaN": ("qwen1.5", set_tensor(UP, with_nan), f"{UP}: holds NaN or infinite values"),
    "another head": (
        "qwen3-tied",
        set_tensor("lm_head.weight", lambda t: torch.ones(250, 64)),
        "lm_head.weight differs from model.embed_tokens.weight though config.json ties them",
    ),
    "missing shard": (
        "qwen2.5",
        lambda f: next(iter(sorted(f.glob("*.safetensors")))).unlink(),
        "model-00001-of-00006.safetensors: missing, though",
    ),
    "shard outside": (
        "qwen2.5",
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}),
        "names '../x.safetensors', which is no file of this folder",
    ),
    "index of nothing": (
        "qwen2.5",
        lambda f: edit(f / "model.safetensors.index.json", weight_map={}),
        "has no weight_map",
    ),
    "index of numbers": (
        "qwen2.5",
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"x": 1}),
        "names no files",
    ),
    "shard without its tensor": (
        "qwen2.5",
        lambda f: edit(
            f / "model.safetensors.index.json",
            weight_map=json.loads((f / "model.safetensors.index.json").read_text())["weight_map"]
            | {"other": "model-00002-of-00006.safetensors"},
        ),
        "model-00002-of-00006.safetensors: has no other, though",
    ),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    family, spoil, message = BAD_FOLDERS[what]
    source = copy(models, family, tmp_path / "hf")
    spoil(source)
    said = refused(capsys, "import-hf", source, tmp_path / "made/dense")

    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_cut_anywhere_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(models, "qwen1.5", tmp_path / "hf")
    path = source / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 7, 8, 9, 500, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "cut short" in refused(capsys, "import-hf", source, tmp_path / "dense")
    path.write_bytes(content + b"x")
    assert "1 bytes too long" in refused(capsys, "import-hf", source, tmp_path / "dense")


def test_a_folder_that_was_not_made_here_is_not_replaced(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert_equal(hf_models.tensors(back), hf_models.tensors(source))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-shard-size", "5"), "argument --max-shard-size: '5' is no size; write it as 5GB"),
        (("--max-shard-size", "0MB"), "'0MB' is no size"),
        (("--shared-expert-width", "-1"), "--shared-expert-width -1: must be 0 or more"),
        (("--tokenizer", "."), "--tokenizer .: holds none of tokenizer.json"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_flags_of_export(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    dense_checkpoint.write(tmp_path / "dense", args=dense_checkpoint.arguments(max_position_embeddings=16))
    assert message in refused(capsys, "export-hf", "dense", "hf", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("decoder.final_layernorm.weight"), "has no tensor decoder.final_layer"),
        (
            lambda tensors: tensors.update({"decoder.other": torch.ones(2)}),
            "holds decoder.other, which has",
        ),
        (
            lambda tensors: tensors.update({"output_layer.weight": torch.ones(41, 32)}),
            r"output_layer.weight is \[41, 32\] where the training arguments give \[40, 32\]",
        ),
        (
            lambda tensors: with_nan(tensors["decoder.layers.mlp.linear_fc2.weight"]),
            "linear_fc2.weight: holds NaN or infinite values",
        ),
    ],
    ids=["missing", "extra", "shape", "NaN"],
)
def test_a_bad_checkpoint_is_not_exported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:

    tensors = dense_checkpoint.tensors()
    spoil(tensors)
    args = dense_checkpoint.arguments(max_position_embeddings=16)
    dense_checkpoint.write(tmp_path / "dense", tensors, args=args)
    assert re.search(message, refused(capsys, "export-hf", tmp_path / "dense", tmp_path / "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_manifest_that_contradicts_the_training_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = make_moe(tmp_path, 6, "--num-experts", 4)
    edit(moe / manifest.NAME, router=json.loads((moe / manifest.NAME).read_text())["router"] | {"top_k": 1})
    said = refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert "top_k 1, but the model was trained with 2" in said


def test_commands_say_what_they_made(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import-hf", str(models / "qwen3"), str(tmp_path / "dense")]) == 0
    said = capsys.readouterr().out
    assert "qwen3 dense, 2 layers" in said and f"--config {tmp_path / 'dense/model.yaml'}" in said
    assert cli.main(["export-hf", str(tmp_path / "dense"), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in said and "no tokenizer was found" in said and "from_pretrained" in said
