"""Small texts and tokenizers of Qwen's kind, and what a prepared prefix holds."""

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_router_upcycling import cli
from megatron_router_upcycling.data.record import Options

# Qwen2's own, from its tokenizer.json.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = [
    *("def", "class", "return", "if", "else", "for", "import", "yield", "lambda", "not", "is", "None"),
    *("naïve", "日本語", "don't", "1234", "x86_64"),
]
# What tokenizers stumble over: composed and decomposed accents, special tokens in the text, spaces, ends.
ODD = [
    "cafe\u0301 and caf\u00e9",
    "<|endoftext|>in the middle<|im_end|> of text",
    "   leading, and trailing   \n\n\n",
    "\ttabs\r\nand\rall ends\u2028of lines",
    "🙂👩‍👩‍👧 \U0010ffff",
    "a\u0000zero",
    " ",
    "x",
]


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Odd ones first, then made-up text."""
    draw = random.Random(seed)
    lines = [[" ".join(draw.choices(WORDS, k=9)) for _ in range(draw.randrange(words))] for _ in range(count)]
    made = ["\n".join(text) for text in lines]
    return (ODD + [text + str(number) for number, text in enumerate(made)])[:count]


@functools.cache
def byte_pairs() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": list(SPECIAL), "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **special)
    tokenizer.train_from_iterator(documents(50, seed=1), trainer)
    return tokenizer


def hugging_face(folder: Path) -> Path:
    """A folder as Qwen's: a byte-level BPE, NFC, special tokens."""
    folder.mkdir(parents=True)
    byte_pairs().save(str(folder / "tokenizer.json"))
    vocabulary = byte_pairs().get_vocab()
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    added = {str(vocabulary[token]): {"content": token, **flags} for token in SPECIAL}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "model_max_length": 64}
    config |= dict.fromkeys(("eos_token", "pad_token"), SPECIAL[0])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def options(**changes: Any) -> Options:
    """What the command's defaults ask for."""
    args = vars(cli.parse(["prepare-data", "--output", "data"])) | {"slurm": {}} | changes
    return Options(**{field.name: args[field.name] for field in dataclasses.fields(Options)})


def run(*words: object) -> int:
    return cli.main(["prepare-data", *map(str, words), "--quiet"])


def lines(path: Path, texts: list[str], **more: object) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokens_in(prefix: Path) -> list[list[int]]:
    """Every document, by Megatron's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    assert len(data) == len(data.document_indices) - 1
    return [data[i].tolist() for i in range(len(data))]


def left_beside(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.parent.iterdir()) if prefix.parent.exists() else []
