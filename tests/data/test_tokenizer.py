"""data/tokenizer.py: which tokens a folder gives, and one digest for all forms of a tokenizer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_router_upcycling.data.tokenizer import load
from tests.data import small

Entries = dict[str, Any]
CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizerFast", None)
MODEL_TYPES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", None)


def edit(folder: Path, change: Callable[[Entries], object], file: str = "tokenizer.json") -> Path:
    entries = json.loads((folder / file).read_text())
    change(entries)
    (folder / file).write_text(json.dumps(entries))
    return folder


def other_split(entries: Entries) -> None:
    """Numbers of up to three digits, as in Llama's; Qwen's rule takes each digit alone."""
    entries["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+| ?[^\p{L}\p{N}]+"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small.hugging_face(tmp_path / "tokenizer")


def test_tokenizer_json_is_read_by_its_own_rules_whatever_stands_beside_it(folder: Path) -> None:
    edit(folder, other_split)
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = small.documents(40)
    expected = [own.encode(text).ids for text in texts]
    assert list(map(AutoTokenizer.from_pretrained(folder).encode, texts)) != expected
    digests = set()
    for name in CLASSES:
        edit(folder, lambda entries, name=name: entries.update(tokenizer_class=name), "tokenizer_config.json")
        for kind in MODEL_TYPES:
            (folder / "config.json").unlink(missing_ok=True)
            if kind:
                (folder / "config.json").write_text(json.dumps({"model_type": kind}))
            loaded = load(folder)
            assert list(map(loaded.encoder(), texts)) == expected, (name, kind)
            digests.add(loaded.sha256)
    assert len(digests) == 1


def saved_again(folder: Path) -> Path:
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder.with_name("again"))
    return folder.with_name("again")


def without_tokenizer_json(folder: Path) -> Path:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    return folder


def other_places(entries: Entries) -> None:
    entries["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] ^= True
    places = {"add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    entries["post_processor"] = {"type": "ByteLevel", **places}
    entries["truncation"] = {"max_length": 5, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    entries["decoder"] = None


def older_form(entries: Entries) -> None:
    entries["model"]["merges"] = [" ".join(pair) for pair in entries["model"]["merges"]]
    entries["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del entries["model"]["ignore_merges"]
    entries["normalizer"] = {"type": "Sequence", "normalizers": [entries["normalizer"]]}


FORMS: dict[str, Callable[[Path], Path]] = {
    "saved again": saved_again,
    "vocab.json": without_tokenizer_json,
    "places": lambda place: edit(place, other_places),
    "older form": lambda place: edit(place, older_form),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_tokenizer_have_one_digest(folder: Path, form: str) -> None:
    before = load(folder).sha256
    assert load(FORMS[form](folder)).sha256 == before


def begins(entries: Entries) -> None:
    token = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, text]
    pair = [text, {"Sequence": {"id": "B", "type_id": 1}}]
    entries["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair}
    entries["post_processor"]["special_tokens"] = {"<|im_start|>": token}


CHANGES: dict[str, Callable[[Entries], object]] = {
    "split": other_split,
    "normaliser": lambda entries: entries.update(normalizer=None),
    "merge": lambda entries: entries["model"]["merges"].pop(),
    "merges ignored": lambda entries: entries["model"].update(ignore_merges=True),
    "flag of an added token": lambda entries: entries["added_tokens"][0].update(lstrip=True),
    "added token": lambda entries: entries["added_tokens"].pop(),
    "token before each text": begins,
    "special tokens as plain text": lambda entries: entries.update(split_special_tokens=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_tokens_changes_the_digest(folder: Path, change: str) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    before = load(folder).sha256
    plain = change == "special tokens as plain text"
    edit(folder, CHANGES[change], "tokenizer_config.json" if plain else "tokenizer.json")
    assert load(folder).sha256 != before


def test_tokens_have_the_type_that_megatron_chooses(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 65_499, 65_500, 200_000):
        assert replace(load(folder), vocab_size=size).dtype is DType.optimal_dtype(size)
