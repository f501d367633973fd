"""What ``convert`` writes, what ``verify`` expects and what a slow reference makes are equal, bit for bit."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import read_method
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.verify import proof
from megatron_router_upcycling.verify.values import WORDS, Sources, blocks
from tests import dense_checkpoint
from tests.dense_checkpoint import ATTENTION, GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS, MLP
from tests.reference.upcycled import upcycle

CONFIGS = Path(__file__).parents[2] / "configs"
STARTS = [
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for folder in ("methods", "ablations")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    # No conversion of a dense model, or one with several files of key statistics.
    if path.stem not in ("base", "scratch", "more_experts", "domains")
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "two layers": {"layers": (0, 2)},
    "shards and a shared expert": {"granularity": 2, "shared_expert": True},
}
UNCUT = ("methods/locmoe", "methods/switch")
SEED = 7
TOKENS = 64

Tensors = dict[str, torch.Tensor]


def grouped_query(dtype: torch.dtype, fused_norms: bool) -> tuple[Tensors, Namespace]:
    values = dense_checkpoint.tensors(dtype)
    if not fused_norms:
        norms = {
            f"{ATTENTION}.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
            f"{MLP}.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
        }
        values = {norms.get(key, key): value for key, value in values.items()}
    return values, dense_checkpoint.arguments()


def multi_head(dtype: torch.dtype, bias: bool) -> tuple[Tensors, Namespace]:
    """Heads with keys of their own; with ``bias`` all of a GPT's biases, and norms stored less the 1."""
    values = dense_checkpoint.tensors(dtype, gated=not bias, bias=bias)
    random = torch.Generator().manual_seed(2)
    qkv = f"{ATTENTION}.linear_qkv"
    shapes: dict[str, tuple[int, ...]] = {
        f"{qkv}.weight": (LAYERS, 3 * HEADS * HEAD_DIM, HIDDEN),
        f"{qkv}.bias": (LAYERS, 3 * HEADS * HEAD_DIM),
    }
    changes: dict[str, Any] = {"group_query_attention": False, "swiglu": not bias, "add_bias_linear": bias}
    if bias:
        changes |= {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True}
        shapes["decoder.final_layernorm.bias"] = (HIDDEN,)
        shapes |= {f"{linear}.layer_norm_bias": (LAYERS, HIDDEN) for linear in (qkv, f"{MLP}.linear_fc1")}
    values |= {key: torch.randn(shape, generator=random).to(dtype) for key, shape in shapes.items()}
    return values, dense_checkpoint.arguments(**changes)


MODELS = {
    "float32, grouped queries": grouped_query(torch.float32, fused_norms=True),
    "bfloat16, grouped queries, norms apart": grouped_query(torch.bfloat16, fused_norms=False),
    "bfloat16": multi_head(torch.bfloat16, bias=False),
    "float32, biases": multi_head(torch.float32, bias=True),
}


CASES = [
    (model, layout, start)
    for model, layout in (
        ("float32, grouped queries", "all layers"),
        ("bfloat16, grouped queries, norms apart", "two layers"),
        ("bfloat16, grouped queries, norms apart", "shards and a shared expert"),
        ("bfloat16", "all layers"),
        ("float32, biases", "two layers"),
    )
    for start in STARTS
    if "granularity" not in LAYOUTS[layout] or start not in UNCUT
]


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint at ``root``, its tensors and arguments, and its key statistics."""

    root: Path
    tensors: Tensors
    args: Namespace
    keys: dict[str, torch.Tensor]  # each query head's [L, H, d], by the name of its kind
    router_input: torch.Tensor

    @property
    def stats(self) -> Path:
        return self.root.with_name("key_stats")


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    root = tmp_path_factory.mktemp("dense") / "dense"
    values, args = MODELS[request.param]
    dense_checkpoint.write(root, values, tensor_parallel=2, args=args)
    groups = GROUPS if args.group_query_attention else HEADS
    random = torch.Generator().manual_seed(1)
    mean, attended = (torch.randn(LAYERS, count, HEAD_DIM, generator=random) for count in (groups, HEADS))
    if groups == HEADS:  # a tie, as there are among the heads of a group
        mean[0, 1] = mean[0, 0]
    keys = {"mean": mean.repeat_interleave(HEADS // groups, dim=1), "attended": attended}
    made = Dense(root, values, args, keys, torch.randn(LAYERS, TOKENS, HIDDEN, generator=random))
    described = {
        "num_layers": LAYERS, "num_query_groups": groups, "kv_channels": HEAD_DIM,
        "num_attention_heads": HEADS, "hidden_size": HIDDEN, "key_source": "pre_rope",
    }  # fmt: skip
    stats = KeyStats(mean, torch.full((LAYERS,), 100), attended, described, made.router_input)
    key_stats_file.save(made.stats, stats)
    return made


def convert(dense: Dense, out: Path, config: str, layout: dict[str, Any]) -> None:
    file = CONFIGS / f"{config}.yaml"
    given = read_method(file)
    command = ["convert", dense.root, out, "--config", file, "--seed", SEED, "--quiet"]
    command += ["--key-stats", dense.stats]
    if "layers" in layout:
        command += ["--layers", ",".join(map(str, layout["layers"]))]
    if "granularity" in layout:  # flags count copies, a file counts shards
        command += ["--granularity", layout["granularity"], "--shared-expert"]
        command += ["--num-experts", given.router["num_experts"], "--top-k", given.router["top_k"]]
    assert cli.main([str(part) for part in command]) == 0


def expected_by_verify(dense: Path, moe: Path) -> Tensors:
    """All that ``verify`` expects, asked for in blocks of a few rows."""
    ready = proof.prepare(dense, moe)
    sources, tensors = Sources(ready.plan.source), {}
    for key, expected in ready.plan.expects(ready.stats).items():
        target = ready.plan.makes()[key]
        assert target is not None
        shape, dtype = target
        made: np.ndarray = np.empty(shape, WORDS[dtype.itemsize])
        for block in blocks(Box((0,) * len(shape), shape), 300):
            for box, source, place in expected.origins(block):
                made[tuple(map(slice, box.offsets, box.ends))] = sources.read(source, place).reshape(
                    box.sizes
                )
        tensors[key] = torch.from_numpy(made).view(dtype)
    return tensors


@pytest.mark.parametrize(("dense", "layout", "config"), CASES, indirect=["dense"])
def test_converter_verify_and_reference_agree(dense: Dense, tmp_path: Path, config: str, layout: str) -> None:
    options = LAYOUTS[layout]
    convert(dense, tmp_path / "moe", config, options)
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    asked = read_method(CONFIGS / f"{config}.yaml").init.head_key
    head_key = asked or ("attended" if dense.args.group_query_attention else "mean")
    router, init = manifest.router_config(record, "moe"), manifest.init_config(record, "moe")
    parts = options.get("shared_expert", False), options.get("layers")
    given = dense.tensors, dense.args, router, init, dense.keys[head_key], dense.router_input
    reference = upcycle(*given, SEED, *parts)
    dense_checkpoint.assert_same(dense_checkpoint.read_back(tmp_path / "moe/release"), reference)
    dense_checkpoint.assert_same(expected_by_verify(dense.root, tmp_path / "moe"), reference)
