"""Collecting keys on one rank and on two, against a reference in loops over what the projection puts out.

The model has grouped-query attention, a bias on its queries, keys and values, and key norms, all with
random values. Run as a script, this file is the process that makes that model and the reference.
"""

import json
import os
import re
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.read_model import query_key_digest
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics import capture
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.moments import attending_heads
from tests import launch

LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN = 4, 4, 2, 8, 32
SEQUENCE, BATCH, ITERATIONS, ROTARY_BASE, EPSILON = 16, 8, 2, 10000, 1e-5
TOKENS = SEQUENCE * BATCH * ITERATIONS
MODEL = f"""
{{num_layers: {LAYERS}, hidden_size: {HIDDEN}, ffn_hidden_size: 48, num_attention_heads: {HEADS},
  group_query_attention: true, num_query_groups: {GROUPS}, kv_channels: {HEAD_DIM}, add_qkv_bias: true,
  qk_layernorm: true, disable_bias_linear: true, normalization: RMSNorm, norm_epsilon: {EPSILON},
  swiglu: true, position_embedding_type: rope, rotary_base: {ROTARY_BASE},
  untie_embeddings_and_output_weights: true, hidden_dropout: 0.0, attention_dropout: 0.0,
  seq_length: {SEQUENCE}, max_position_embeddings: {SEQUENCE},
  tokenizer_type: NullTokenizer, vocab_size: 256, split: "100,0,0", micro_batch_size: 2,
  global_batch_size: {BATCH}, train_iters: 5, lr: 1.0e-3}}
"""

# Name -> what is changed in the arguments of a run that works (FOLDER is the fixture's), what is said.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "half-written checkpoint": ({"load": "FOLDER/half"}, "half/.*half-written"),
    "a Mixture-of-Experts": ({"load": "FOLDER/moe"}, "--load .*moe, .*: keys are collected from a dense"),
    "another model": ({"rotary_base": 500000}, "rotary_base 500000, but .*dense was trained with 10000"),
    "output exists": ({"output": "FOLDER/config.yaml"}, "--output .*config.yaml: exists; pass --overwrite"),
    "no output": ({"output": None}, "--output: name the file"),
    "no data": ({"data_path": None}, "--data-path: name the data"),
    "missing data": ({"data_path": ["FOLDER/absent"]}, "--data-path .*absent: no file .*absent.bin"),
    "no iterations": ({"collect_iters": 0}, "--collect-iters 0: must be at least 1"),
    "too many ranks": ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size 4: use at most 2"),
}


def make(folder: Path) -> None:
    """Write a dense checkpoint and what follows from it.

    ``loops``: the reference, from the projection's output. ``single``: what key_stats captures
    in this one process from the same batches. ``mistakes.json``: what ``check`` says to each of MISTAKES.
    """
    from megatron_router_upcycling.key_statistics import collect
    from megatron_router_upcycling.training import launch

    config, dense = str(folder / "config.yaml"), str(folder / "dense")
    args = launch.prepare(["--config", config, "--save", dense, "--save-interval", "1"]).args
    model = collect.load_model(args)
    randomise(model)

    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, model, None, None, 0)
    args.save, args.num_experts = str(folder / "moe"), 4
    save_checkpoint(1, model, None, None, 0)
    args.num_experts = None
    said = {what: said_to(args, folder, change) for what, (change, _) in MISTAKES.items()}
    (folder / "mistakes.json").write_text(json.dumps(said))

    outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(LAYERS)}
    attentions = capture.self_attentions(model)
    for layer, attention in enumerate(attentions):
        attention.linear_qkv.register_forward_hook(
            lambda module, inputs, output, layer=layer: outputs[layer].append(output[0].detach().clone())
        )
    captured = collect.new_sums(args)
    data = collect.train_iterators(args, len(model), ITERATIONS)
    inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(LAYERS)}
    mlps = [module for module in model[0].modules() if type(module).__name__ == "MLP"]
    for layer, mlp in enumerate(mlps):
        mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs[layer].append(args[0].transpose(0, 1).flatten(0, 1))
        )
    with capture.capture_keys(model, captured):
        losses = sum(collect.forward(args, model, data) for _ in range(ITERATIONS))
    # Every token is in the sample, which is larger than the data: sample after sample, token after token.
    everything = torch.stack([torch.cat(inputs[layer]) for layer in range(LAYERS)])
    safetensors.torch.save_file({"router_input": everything.contiguous()}, folder / "router_input")
    assert not any("get_query_key_value_tensors" in vars(attention) for attention in attentions)
    tensors = {name: torch.from_numpy(value) for name, value in means_by_loops(outputs, attentions).items()}
    safetensors.torch.save_file(tensors, folder / "loops")
    assert captured.tokens == TOKENS
    tensors = {"mean": captured.mean(), "attended": captured.attended(), "losses": losses}
    safetensors.torch.save_file(tensors, folder / "single")


def said_to(args: Namespace, folder: Path, change: dict[str, Any]) -> str:
    """What ``check`` says to ``args`` with ``change``; without the change it must say nothing."""
    from megatron_router_upcycling import collect_keys
    from megatron_router_upcycling.key_statistics import collect
    from megatron_router_upcycling.training import launch

    if not (folder / "half").exists():
        shutil.copytree(folder / "dense", folder / "half")
        data = max((folder / "half").rglob("*.distcp"), key=lambda path: path.stat().st_size)
        os.truncate(data, data.stat().st_size // 2)
    works = vars(args) | {"load": str(folder / "dense"), "output": str(folder / "new")}

    def check(args: Namespace) -> None:
        collect_keys.check_flags(args)
        collect.check(launch.Run(args, None))

    check(Namespace(**works))
    change = json.loads(json.dumps(change).replace("FOLDER", str(folder)))
    try:
        check(Namespace(**works | change))
    except UserError as error:
        return str(error)
    return "nothing"


def randomise(model: list[torch.nn.Module]) -> None:
    """Give biases and norms values that a mistake would show in (Megatron begins with zeros and ones)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def means_by_loops(outputs: dict[int, list[torch.Tensor]], attentions: list[Any]) -> dict[str, np.ndarray]:
    """The ``mean`` keys [L, G, d] and ``attended`` keys [L, H, d], in float64.

    Args:
        outputs: for each layer, the projection's [sequence, batch, (H + 2G) d] of every micro-batch.
        attentions: for each layer, the module, whose norms' weights [d] are read.
    """
    mean = np.zeros((LAYERS, GROUPS, HEAD_DIM))
    attended, taken = np.zeros((LAYERS, HEADS, HEAD_DIM)), np.zeros((LAYERS, HEADS, 1))
    queries = HEADS // GROUPS  # in a group, before its key and its value
    for layer, attention in enumerate(attentions):
        both = attention.q_layernorm, attention.k_layernorm
        norms = [norm.weight.detach().double().numpy() for norm in both]
        for output in outputs[layer]:
            array = output.double().numpy()
            for sample, group in np.ndindex(array.shape[1], GROUPS):
                first = group * (queries + 2) * HEAD_DIM
                heads = [
                    array[:, sample, first + place * HEAD_DIM : first + (place + 1) * HEAD_DIM]
                    for place in range(queries + 1)
                ]
                keys = [normed(key, norms[1]) for key in heads[queries]]
                turned = [[normed(query, norms[0]) for query in head] for head in heads[:queries]]
                own = np.array([[q @ k for q, k in zip(head, keys, strict=True)] for head in turned])
                own -= own.mean(axis=1, keepdims=True)
                for position, key in enumerate(keys):
                    mean[layer, group] += key / TOKENS
                    head = group * queries + max(range(queries), key=lambda place: own[place, position])
                    attended[layer, head] += key
                    taken[layer, head] += 1
    assert taken.min() > TOKENS / 50
    return {"mean": mean, "attended": attended / taken}


def normed(head: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return head / np.sqrt((head * head).mean() + EPSILON) * weight


def rotated(head: np.ndarray, position: int) -> np.ndarray:
    """A head's query or key [d] after the rotary embedding."""
    half = HEAD_DIM // 2
    angle = position * ROTARY_BASE ** (-np.arange(half) / half)
    low, high = head[:half], head[half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder that ``make`` filled."""
    folder = tmp_path_factory.mktemp("collect_keys")
    config = yaml.safe_load(MODEL) | {"data_path": [str(data)], "data_cache_path": str(folder / "cache")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    launch.ranks(1, __file__, folder).ok()
    return folder


def collect(made: Path, ranks: int, *flags: object) -> launch.Output:
    options = ("--config", made / "config.yaml", "--load", made / "dense", "--collect-iters", ITERATIONS)
    return launch.ranks(ranks, "collect_keys", *options, *flags)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32 rounding, relative to the keys (about 1) and not to their mean."""
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6, check_dtype=False)


def test_one_process_equals_the_reference_in_loops(made: Path) -> None:
    single, loops = (safetensors.torch.load_file(made / kind) for kind in ("single", "loops"))
    for name in ("mean", "attended"):
        assert_same(single[name], loops[name])
    by_head = loops["attended"]
    assert (by_head[:, ::2] - by_head[:, 1::2]).abs().max() > 0.01  # else one of a group could stand for all


@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
        [],
    ],
    ids=["tensor-parallel", "virtual-pipeline-parallel", "data-parallel"],
)
def test_two_ranks_equal_one(made: Path, data: Path, tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "stats.safetensors"
    collect(made, 2, "--output", output, *flags).ok()
    stats = key_stats_file.load(output)
    single = safetensors.torch.load_file(made / "single")
    assert stats.count.tolist() == [TOKENS] * LAYERS
    for name in ("mean", "attended"):
        assert_same(getattr(stats, name), single[name])
    seen = safetensors.torch.load_file(made / "router_input")["router_input"]
    assert seen.shape == (LAYERS, TOKENS, HIDDEN)
    for layer in range(LAYERS):
        torch.testing.assert_close(key_stats_file.read_router_input(output, layer), seen[layer])
    metadata = stats.metadata
    assert metadata["key_source"] == "pre_rope" and metadata["tokens"] == TOKENS
    assert metadata["checkpoint"] == str(made / "dense") and len(metadata["checkpoint_digest"]) == 64
    assert metadata["query_key_digest"] == query_key_digest(open_dense(made / "dense"))
    assert metadata["data"] == [str(data)] and metadata["iterations"] == ITERATIONS
    assert metadata["lm_loss"] == pytest.approx(float(single["losses"][0] / single["losses"][1]), rel=1e-5)


def test_a_blend_with_held_out_data(made: Path, data: Path, tmp_path: Path) -> None:
    blend = ("1", data, "1", data)
    collect(made, 1, "--output", tmp_path / "stats", "--data-path", *blend, "--split", "90,10,0").ok()
    assert key_stats_file.load(tmp_path / "stats").count.tolist() == [TOKENS] * LAYERS


def test_part_of_the_tokens_are_kept_or_none(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats.safetensors"
    collect(made, 1, "--output", output, "--router-samples", 20).ok()
    seen = safetensors.torch.load_file(made / "router_input")["router_input"]
    kept = torch.stack([key_stats_file.read_router_input(output, layer) for layer in range(LAYERS)])
    places = [int((seen[0] == row).all(dim=1).nonzero()[0]) for row in kept[0]]
    assert len(set(places)) == 20 and places == sorted(places)
    assert torch.equal(kept, seen[:, places])

    key_stats_file.save(output, key_stats_file.load(output), overwrite=True)  # without them, as older files
    with pytest.raises(UserError, match="holds no hidden states .*; collect the statistics again"):
        key_stats_file.read_router_input(output, 0)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_the_norm_inside_transformer_engines_projection(norm: str, zero_centered: bool) -> None:
    (weight, bias), hidden, full = torch.rand(2, HIDDEN), torch.randn(5, HIDDEN), norm == "LayerNorm"
    linear = types.SimpleNamespace(layer_norm_weight=weight, layer_norm_bias=bias)
    mlp = types.SimpleNamespace(linear_fc1=linear)
    config = Namespace(
        normalization=norm, layernorm_epsilon=EPSILON, layernorm_zero_centered_gamma=zero_centered
    )
    found = capture._norm_inside(mlp, config)(hidden)
    for token, row in zip(hidden.double(), found, strict=True):
        token = token - full * token.mean()
        expected = token / ((token * token).sum() / HIDDEN + EPSILON).sqrt() * (weight + zero_centered)
        expected += full * bias
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tensor", "context", "data"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (1, 4, 2)])
def test_each_token_of_the_sample_is_one_ranks(tensor: int, context: int, data: int) -> None:
    """Over all ranks of a layout, each token once, at a place of its own, in its sequence's part."""
    args = Namespace(
        seq_length=16, global_batch_size=8, micro_batch_size=2, collect_iters=2, data_parallel_size=data,
        context_parallel_size=context, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1,
        hidden_size=1, params_dtype=torch.float32,
    )  # fmt: skip
    length = 16 // context // tensor
    rows = []
    for dp, cp, tp in np.ndindex(data, context, tensor):
        sample = capture.RouterInput(args, 999, {"dp": dp, "cp": cp, "tp": tp})
        for call, places in sample.places.items():
            own, positions, samples = zip(*places, strict=True)
            assert call < 2 * 8 // (2 * data) and max(positions) < length and max(samples) < 2
            assert len(set(zip(positions, samples, strict=True))) == len(own) == 2 * length
            parts = {row % 16 // (16 // (2 * context)) for row in own}
            assert context == 1 or parts <= {cp, 2 * context - 1 - cp}
            rows += own
    assert sorted(rows) == list(range(2 * 8 * 16))


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_refused_in_one_line(made: Path, what: str) -> None:
    said = json.loads((made / "mistakes.json").read_text())[what]
    assert re.search(MISTAKES[what][1], said) and "\n" not in said


def test_a_mistake_ends_the_run(made: Path, tmp_path: Path) -> None:
    """One line from rank 0 alone, exit status 2, no traceback of ours, nothing lost and nothing made."""
    output = tmp_path / "precious"
    output.write_text("precious")
    result = collect(made, 2, "--output", output)
    assert result.returncode == 2 and len(result.errors) == 1, result.text[-4000:]
    assert "exists; pass --overwrite" in result.errors[0] and "collect_keys.py" not in result.text
    assert output.read_text() == "precious" and os.listdir(tmp_path) == ["precious"]


def test_a_model_without_grouped_query_attention() -> None:
    """Megatron saves its number of heads as num_query_groups, which the flags of the same run leave at 1."""
    from megatron_router_upcycling.key_statistics import collect

    sizes = {"num_attention_heads": HEADS, "group_query_attention": False, "hidden_size": HIDDEN}
    trained = Namespace(num_query_groups=HEADS, **sizes)
    files = {"load": "dense", "config": "config.yaml"}
    flags = Namespace(tensor_model_parallel_size=4, num_query_groups=1, **sizes, **files)
    collect.check_architecture(flags, trained)
    trained.num_attention_heads = 2 * HEADS
    with pytest.raises(UserError, match=f"num_attention_heads {HEADS}, but .* was trained with {2 * HEADS}"):
        collect.check_architecture(flags, trained)


def test_a_moved_seam_is_named() -> None:
    changed = types.SimpleNamespace()  # an attention that has lost what keys are captured at
    with pytest.raises(RuntimeError, match=r"SelfAttention\.get_query_key_value_tensors does not exist"):
        capture._take_before_rotary(changed, lambda query, key: None)


def test_the_unsplit_projection_of_a_fused_rotary_kernel() -> None:
    """With ``split_qkv=False`` Megatron returns (mixed, sizes): the key stands between query and value."""
    mixed = torch.randn(SEQUENCE, 2, GROUPS, 4 * HEAD_DIM)
    unsplit = mixed, [2 * HEAD_DIM, HEAD_DIM, HEAD_DIM]
    attention = types.SimpleNamespace(get_query_key_value_tensors=lambda: unsplit)
    taken: list[torch.Tensor] = []
    capture._take_before_rotary(attention, lambda query, key: taken.extend((query, key)))
    attention.get_query_key_value_tensors()
    query, key = taken
    assert torch.equal(key, mixed[..., 2 * HEAD_DIM : 3 * HEAD_DIM])
    assert query.shape == (SEQUENCE, 2, 2 * GROUPS, HEAD_DIM)
    assert torch.equal(query[:, :, 3], mixed[:, :, 1, HEAD_DIM : 2 * HEAD_DIM])


def test_packed_sequences_and_the_rotary_embedding_change_no_head() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(SEQUENCE, 1, n, HEAD_DIM, generator=random) for n in (HEADS, GROUPS))
    heads = attending_heads(query, key)
    assert heads is not None and heads.unique().tolist() == list(range(HEADS // GROUPS))
    packed = attending_heads(query.squeeze(1), key.squeeze(1))
    assert packed is not None and torch.equal(packed, heads.squeeze(1))
    turned = [x.clone() for x in (query, key)]
    for x in turned:
        for position, head in np.ndindex(SEQUENCE, x.shape[2]):
            x[position, 0, head] = torch.from_numpy(rotated(x[position, 0, head].numpy(), position))
    after = attending_heads(*turned)
    assert after is not None and torch.equal(after, heads)
    assert attending_heads(key, key) is None


def test_a_heads_mean_is_over_all_parts_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = 2 + torch.randn(SEQUENCE, 1, HEADS, HEAD_DIM), torch.randn(SEQUENCE, 1, GROUPS, HEAD_DIM) + 1
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.mul_(2))  # of two alike
    found = attending_heads(query, key, types.SimpleNamespace(size=lambda: 2))
    assert found is not None and torch.equal(found, attending_heads(query, key))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
