"""Tokenizer, templates and settings go where the model goes, and folders may be moved on the way."""

import argparse
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import tokenizers
import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import yaml_files
from megatron_router_upcycling.data.tokenizer import load as tokens_of
from megatron_router_upcycling.data.tokenizer import train
from megatron_router_upcycling.training import data as run_data
from tests import dense_checkpoint
from tests.hf.folders import Capsys, copy, edit, output, refused, run, write_tokenizer

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What trainers, quantisers and other tools leave beside a model, and would change what the folder is.
LEFTOVERS = (
    *("optimizer.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "pytorch_model.bin"),
    *("quantize_config.json", "hf_quant_config.json", "model.gguf", "consolidated.safetensors", "x.yaml"),
    *("checkpoint-5/tokenizer.json", "checkpoint-5/chat_template.jinja", "runs/1/events"),
    *("modeling_other.py", ".gitattributes"),
)
CARRIED = ("additional_chat_templates/tool_use.jinja", "LICENSE", "1_Pooling/config.json")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_not_weights_goes_along_or_is_named(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    source = copy(models, "qwen1.5", tmp_path / "hf")
    write_tokenizer(source)
    put(source, *CARRIED, "README.md", *ADAPTER, *LEFTOVERS)
    before = (source / "tokenizer_config.json").read_bytes()
    said = output(capsys, "import-hf", source, tmp_path / "dense")
    assert "left out: adapter_config.json, adapter_model.safetensors, " in said
    for name in ("checkpoint-5/", "runs/", "modeling_other.py", "optimizer.pt", "hf_quant_config.json"):
        assert name in said
    assert " model.safetensors" not in said
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    kept = tokenizer_files | {"config.json", "generation_config.json", *CARRIED}
    assert files_in(tmp_path / "dense/tokenizer") == kept | {"README.md"}

    assert run("convert", tmp_path / "dense", tmp_path / "moe", "--router", "linear") == 0
    put(tmp_path / "moe/tokenizer", *ADAPTER)  # as an earlier version has left it
    assert "left out: README.md (the export has its own)" in output(
        capsys, "export-hf", tmp_path / "moe", tmp_path / "back"
    )
    made = {"README.md", "export_hf.json", "model.safetensors"}
    assert files_in(tmp_path / "back") == kept | made
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back")("b a").input_ids == [3, 2]
    assert before == (source / "tokenizer_config.json").read_bytes()

    put(adapter := tmp_path / "adapter", *ADAPTER, *LEFTOVERS)
    write_tokenizer(adapter)
    assert run("export-hf", tmp_path / "dense", tmp_path / "other", "--tokenizer", adapter) == 0
    assert files_in(tmp_path / "other") == tokenizer_files | {"config.json", "generation_config.json"} | made
    said = refused(capsys, "import-hf", adapter, tmp_path / "none")
    assert "holds no model; adapter_config.json is of an adapter: merge it" in said
    of_another_kind(tmp_path / "third")
    words = ("export-hf", tmp_path / "dense", tmp_path / "third-export", "--tokenizer", tmp_path / "third")
    assert "asked for gives other tokens than the one beside the checkpoint" in output(capsys, *words)


def of_another_kind(folder: Path) -> None:
    """A tokenizer that splits text otherwise than Qwen's, as transformers 5 saves it."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<call>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", extra_special_tokens=["<call>"]
    )
    fast.save_pretrained(folder)


TEXT = "In 1984 there were 365 days,  12345 hours.\n\nIn 365 days don't count <call> 1984."


@pytest.mark.parametrize("name", ["TokenizersBackend", "Qwen2Tokenizer"])
def test_the_export_gives_the_tokens_of_the_data(
    models: Path, tmp_path: Path, capsys: Capsys, name: str
) -> None:
    """Also where transformers takes the dense folder for one with Qwen's tokenizer. Of a dense model it does
    so again, which is said."""
    source = copy(models, "qwen1.5", tmp_path / "hf")
    edit(source / "config.json", vocab_size=256)
    of_another_kind(source)
    edit(source / "tokenizer_config.json", tokenizer_class=name)
    own = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    assert transformers.AutoTokenizer.from_pretrained(source).encode(TEXT) != own
    assert run("import-hf", source, tmp_path / "dense") == 0
    assert run("convert", tmp_path / "dense", tmp_path / "moe", "--router", "linear") == 0
    assert tokens_of(tmp_path / "dense/tokenizer").encoder()(TEXT) == own

    assert "tokenizer" not in output(capsys, "export-hf", tmp_path / "moe", tmp_path / "back")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").encode(TEXT) == own
    entries = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert entries["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows too
    assert entries["additional_special_tokens"] == ["<call>"] and "extra_special_tokens" not in entries

    said = output(capsys, "export-hf", tmp_path / "dense", tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    for text in (said, card):
        assert (
            "AutoTokenizer gives other tokens than those of training (it takes Qwen2Tokenizer here)" in text
        )
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again").encode(TEXT) == own


def test_a_tokenizer_that_cannot_be_loaded_is_named(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert run("import-hf", models / "qwen3", tmp_path / "dense") == 0
    put(tmp_path / "broken", "tokenizer.json")
    words = ("export-hf", tmp_path / "dense", tmp_path / "back", "--tokenizer", tmp_path / "broken")
    assert "tokenizer: transformers cannot load it, and it was copied as it is (" in output(capsys, *words)
    assert str(tmp_path) not in (tmp_path / "back/README.md").read_text()


def test_settings_go_along_without_a_tokenizer(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen2.5", tmp_path / "hf")
    edit(source / "config.json", eos_token_id=1, bos_token_id=2)
    edit(source / "generation_config.json", eos_token_id=[1, 7], temperature=0.6, do_sample=True)
    assert run("import-hf", source, tmp_path / "dense") == 0
    assert "tokenizer_model" not in yaml_files.read_yaml(tmp_path / "dense/model.yaml")
    assert run("export-hf", tmp_path / "dense", tmp_path / "back") == 0
    config, generation = (
        json.loads((tmp_path / "back" / name).read_text())
        for name in ("config.json", "generation_config.json")
    )
    assert (config["eos_token_id"], config["bos_token_id"]) == (1, 2)
    assert (generation["eos_token_id"], generation["temperature"]) == ([1, 7], 0.6)


def test_folders_may_be_moved_and_removed(models: Path, tmp_path: Path) -> None:
    source = copy(models, "qwen3", tmp_path / "hf")
    write_tokenizer(source)
    assert run("import-hf", source, tmp_path / "dense") == 0
    assert run("convert", tmp_path / "dense", tmp_path / "moe", "--router", "linear") == 0
    (tmp_path / "dense").rename(tmp_path / "moved")
    shutil.rmtree(source)
    flags = yaml_files.read_yaml(tmp_path / "moved/model.yaml")
    assert flags["tokenizer_model"] == str(tmp_path / "moved/tokenizer")
    assert open_checkpoint(tmp_path / "moved").args.tokenizer_model == str(tmp_path / "dense/tokenizer")
    shutil.rmtree(tmp_path / "moved")
    assert run("export-hf", tmp_path / "moe", tmp_path / "back") == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back")("b a").input_ids == [3, 2]


def test_run_takes_the_checkpoints_tokenizer_and_hands_it_on(tmp_path: Path) -> None:
    load, save, other = tmp_path / "moe", tmp_path / "run", tmp_path / "other"
    for folder in (load / beside.FOLDER, other):
        (folder / "additional").mkdir(parents=True)
        write_tokenizer(folder)
        (folder / "additional/x.jinja").write_text(folder.name)
    (tmp_path / "sp").mkdir()
    (model := tmp_path / "sp/tokenizer.model").write_bytes(b"model")

    def choose(kind: str | None, model: object, *argv: str) -> tuple[Namespace, str | None]:
        args = Namespace(tokenizer_type=kind, tokenizer_model=model and str(model))
        return args, run_data.choose_tokenizer(args, list(argv), str(load))

    fast, null = "HuggingFaceTokenizer", "NullTokenizer"
    for kind, asked in ((None, None), (fast, None), (None, tmp_path / "moved")):
        args, line = choose(kind, asked)
        assert (args.tokenizer_type, args.tokenizer_model) == (fast, str(load / beside.FOLDER))
        assert line and (("is not there" in line) == (asked is not None))
    wrong = str(tmp_path / "wrong")
    for kind, asked, *argv in ((fast, other), (null, None), (fast, wrong, "--tokenizer-model", wrong)):
        args, line = choose(kind, asked, *argv)
        assert (args.tokenizer_type, args.tokenizer_model, line) == (kind, asked and str(asked), None)

    run_data.hand_on_tokenizer(choose(null, None)[0], str(load), str(save))
    assert (save / "tokenizer/additional/x.jinja").read_text() == "tokenizer"
    assert (save / "tokenizer/tokenizer.json").samefile(load / "tokenizer/tokenizer.json")
    for _ in range(2):  # as a run that is started again
        run_data.hand_on_tokenizer(choose(None, other)[0], str(load), str(save))
        assert (save / "tokenizer/additional/x.jinja").read_text() == "other"
    assert (load / "tokenizer/additional/x.jinja").read_text() == "tokenizer"
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    run_data.hand_on_tokenizer(args, None, str(save / "second"))
    copied = save / "second/tokenizer/tokenizer.model"
    assert beside.tokenizer_of(save / "second" / beside.FOLDER) == ("SentencePieceTokenizer", copied)


def test_a_sentencepiece_tokenizer_is_exported_as_transformers_loads_it(
    tmp_path: Path, capsys: Capsys
) -> None:
    """One that was trained here: the same tokens of every text, but of a model that transformers takes to
    have Qwen's own. One that is damaged is said to be."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    dense_checkpoint.write(dense, args=dense_checkpoint.arguments(max_position_embeddings=16, vocab_size=37))
    assert run("convert", dense, moe, "--router", "linear") == 0
    texts = [path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("a*.py"))]
    model = tmp_path / "text.tokenizer.model"
    model.write_bytes(train(texts, 400))
    for root in (dense, moe):
        beside.hand_on(model, root)
    capsys.readouterr()

    assert "no tokenizer" not in output(capsys, "export-hf", moe, tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    own = SentencePieceProcessor(model_file=str(model))
    for text in (*texts, " ünïcode \n\n\t x", ""):
        assert loaded.encode(text) == own.encode(text)
        assert loaded.decode(own.encode(text)) == text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    assert [config[name] for name in names] == [getattr(loaded, name) for name in names] == [1, 2, 3]

    said = output(capsys, "export-hf", dense, tmp_path / "qwen2")
    assert (
        "no tokenizer was written: for text.tokenizer.model transformers would load a Qwen2Tokenizer" in said
    )
    # Under the name that transformers looks for, too.
    (moe / beside.FOLDER / model.name).unlink()
    (moe / beside.FOLDER / "tokenizer.model").write_bytes(b"none")
    assert "no tokenizer was written: tokenizer.model cannot be converted (" in output(
        capsys, "export-hf", moe, tmp_path / "named"
    )
    assert not any((tmp_path / f"{name}/tokenizer.json").exists() for name in ("qwen2", "named"))
