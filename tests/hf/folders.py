"""What the tests of folders share: running the commands, and making folders to run them on."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats

Capsys = pytest.CaptureFixture[str]
TOKENS = torch.arange(24)[None] * 11 % 250


def run(*args: object) -> int:
    return cli.main([*map(str, args), "--quiet"])


def refused(capsys: Capsys, *args: object) -> str:
    """The one line that a command says of a mistake."""
    capsys.readouterr()
    assert run(*args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def output(capsys: Capsys, *args: object) -> str:
    """What a command that ends well prints."""
    capsys.readouterr()
    assert cli.main([*map(str, args)]) == 0
    return capsys.readouterr().out


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(models: Path, family: str, target: Path) -> Path:
    shutil.copytree(models / family, target)
    return target


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


def dense_tensors(args: Namespace) -> dict[str, torch.Tensor]:
    """Random parameters of the model of ``dense_checkpoint.arguments`` with some of them changed."""
    tensors = dense_checkpoint.tensors()
    attention = dense_checkpoint.ATTENTION
    if not args.add_qkv_bias:
        del tensors[f"{attention}.linear_qkv.bias"]
    if args.qk_layernorm:
        norm = torch.ones(dense_checkpoint.LAYERS, dense_checkpoint.HEAD_DIM)
        tensors |= {f"{attention}.{name}_layernorm.weight": norm for name in "qk"}
    if not args.untie_embeddings_and_output_weights:
        del tensors["output_layer.weight"]
    if args.normalization == "LayerNorm":
        tensors |= {key.replace("weight", "bias"): value for key, value in tensors.items() if "norm" in key}
    return tensors


def write_moe(root: Path, tensors: dict[str, torch.Tensor], args: Namespace) -> None:
    """A checkpoint of one rank, with layers stacked or under keys of their own."""
    if any(re.match(r"decoder\.layers\.\d", key) for key in tensors):
        apart = dense_checkpoint.Folder(root / "iter_0000008")
        for key, value in tensors.items():
            apart.add(key, value, (1,) * value.dim())
        apart.add_object("common_state/shard_0_1", {"args": args})
        apart.finish()
        (root / "latest_checkpointed_iteration.txt").write_text("8")
    else:
        dense_checkpoint.write(root, tensors, args=args, extra_states=False)


def make_moe(folder: Path, seed: int, *options: object, **changes: Any) -> Path:
    """A converted checkpoint whose every value is then drawn at random, experts apart, one rank's chunks."""
    args = dense_checkpoint.arguments(max_position_embeddings=16, **changes)
    dense_checkpoint.write(folder / "dense", dense_tensors(args), args=args)
    make_stats(folder / "ks")
    assert run("convert", folder / "dense", folder / "upcycled", "--key-stats", folder / "ks", *options) == 0
    upcycled = open_checkpoint(folder / "upcycled")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(value.shape, generator=generator) * 0.3
        for key, value in dense_checkpoint.read_back(upcycled.iteration_dir).items()
    }
    for key in tensors:
        if key.endswith("pre_mlp_layernorm.weight"):
            tensors[key] = tensors[key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")]
    write_moe(folder / "moe", tensors, upcycled.args)
    manifest.write(folder / "moe", manifest.read(folder / "upcycled") or {})
    return folder / "moe"


def make_stats_of(path: Path, dense: Path) -> Path:
    """Random key statistics of an imported model."""
    flags = yaml.safe_load((dense / "model.yaml").read_text())
    names = ("num_layers", "num_query_groups", "kv_channels", "num_attention_heads", "hidden_size")
    metadata = {name: flags[name] for name in names} | {"key_source": "pre_rope"}
    layers, groups, size, heads = (flags[name] for name in names[:4])
    generator = torch.Generator().manual_seed(1)
    mean, attended = (torch.randn(layers, count, size, generator=generator) for count in (groups, heads))
    key_stats_file.save(path, KeyStats(mean, torch.full((layers,), 512), attended, metadata), overwrite=True)
    return path
