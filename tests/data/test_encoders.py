"""data/encoders.py: tiktoken gives the tokens of tokenizers, or is not used and says why."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_router_upcycling.data import encoders
from tests.data import small

ODD = [*encoders.SAMPLE, *small.documents(60), "", " " * 3000, "<|im_end|>\u0338 e<|im_start|>\u0301"]


def trained(kind: str) -> dict[str, Any]:
    """tokenizer.json of a tokenizer of Qwen's or GPT-2's kind, trained on code."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    own = json.loads(small.byte_pairs().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"special_tokens": list(small.SPECIAL), "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, **special)
    tokenizer.train_from_iterator(Path(json.__file__).read_text().splitlines() + ODD, trainer)
    content = json.loads(tokenizer.to_str())
    if kind == "qwen":
        content |= {name: own[name] for name in ("normalizer", "pre_tokenizer")}
    content["added_tokens"][-1]["special"] = False
    return content


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
@pytest.mark.parametrize("plain", [False, True], ids=["special tokens", "as plain text"])
@pytest.mark.parametrize("ignore", [False, True], ids=["", "merges ignored"])
def test_tokens_are_those_of_tokenizers(kind, plain, ignore):
    content = trained(kind)
    content["model"]["ignore_merges"] = ignore
    if ignore and plain:
        with pytest.raises(encoders.Unsuited, match="its merges do not give its token 0"):
            encoders.of(json.dumps(content), plain, tiktoken=True)
        return
    fast, slow = (encoders.of(json.dumps(content), plain, tiktoken=way) for way in (True, False))
    draw = random.Random(0)
    letters = "aeitns \n\t'.0123éß日\u0301\u0338<|im_end|>🙂"
    drawn = ["".join(draw.choices(letters, k=draw.randrange(80))) for _ in range(2000)]
    texts = [*ODD, *drawn, Path(random.__file__).read_text(), " " * 1_200_000]
    assert [list(fast(text)) for text in texts] == [slow(text) for text in texts]


def swapped(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def prefixed(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "normaliser": (lambda c: c.update(normalizer={"type": "NFKC"}), "its normaliser is not NFC"),
    "prefix": (prefixed, "pre-tokeniser"),
    "order of merges": (swapped, "its merges are not in the order of its tokens"),
    "a merge less": (lambda c: c["model"]["merges"].pop(), "its merges do not give its token 1499"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "its model is not a plain BPE"),
    "white space": (lambda c: c["added_tokens"][0].update(lstrip=True), "is looked for otherwise"),
    "normalised": (lambda c: c["added_tokens"][0].update(normalized=True), "is looked for otherwise"),
    "other kind": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokeniser is not a"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tokenizers_are_refused(name):
    content = trained("qwen")
    change, why = CHANGES[name]
    change(content)
    with pytest.raises(encoders.Unsuited, match=why):
        encoders.of(json.dumps(content), False, tiktoken=True)


def test_the_command_says_why_it_falls_back(tmp_path, capsys, monkeypatch):
    from megatron_router_upcycling import cli

    place = small.hugging_face(tmp_path / "tokenizer")
    text = small.lines(tmp_path / "a.jsonl", ["one", "two"])
    words = ["prepare-data", str(text), "--tokenizer", str(place), "--output", str(tmp_path / "data")]
    assert cli.main(words) == 0 and "tiktoken" not in capsys.readouterr().out
    of, wanted = encoders.of, small.tokens_in(tmp_path / "data")
    monkeypatch.setattr(encoders, "of", lambda *a: (lambda encode: lambda text: encode(text)[a[2] :])(of(*a)))
    assert cli.main([*words, "--overwrite"]) == 0 and small.tokens_in(tmp_path / "data") == wanted
    assert "in 1 of 1 parts tiktoken gives other tokens" in capsys.readouterr().out
    content = json.loads((place / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    (place / "tokenizer.json").write_text(json.dumps(content))
    assert cli.main([*words, "--overwrite"]) == 0
    said = "tokens by tokenizers, which is slower than tiktoken: its normaliser is not NFC"
    assert said in capsys.readouterr().out
