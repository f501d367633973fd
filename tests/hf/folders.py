"""What the tests of folders share: running the commands, and making folders to run them on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats

TOKENS = torch.arange(24)[None] * 11 % 250


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


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


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
