"""The pure part of key_stats: sums, merging, and the file."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.moments import KeySums, sum_over_tokens

L, G, D, H = 3, 4, 5, 8
METADATA: dict[str, object] = {
    **{"num_layers": L, "num_query_groups": G, "kv_channels": D, "num_attention_heads": H},
    "key_source": "pre_rope",
}


def random_keys(tokens: int, groups: int = G, dim: int = D, seed: int = 0) -> torch.Tensor:
    """[T, G, d] with a mean of its own for each component, from near 0 to many standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(groups, dim, generator=generator) * torch.logspace(-2, 2, dim)
    return torch.randn(tokens, groups, dim, generator=generator) + offset


def sums_of(keys: torch.Tensor, heads: torch.Tensor | None = None) -> KeySums:
    """The sums of keys [L, T, G, d], of one head a group or of ``heads`` [L, T, G], added in one piece."""
    sums = KeySums(len(keys), keys.shape[2] if heads is None else H, *keys.shape[2:])
    for layer, keys_TGd in enumerate(keys):
        sums.add(layer, 0, keys_TGd, None if heads is None else heads[layer])
    return sums


def random_heads(tokens: int) -> torch.Tensor:
    return torch.randint(H // G, (L, tokens, G), generator=torch.Generator().manual_seed(3))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 1023, 5000])
def test_sums_are_better_than_float32(tokens: int, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    keys = random_keys(tokens, groups=2, dim=8).to(dtype)
    total = sum_over_tokens(keys.to(device)).cpu()
    exact = keys.double()
    # On the GPU one micro-batch's sum carries the roundings of a tree of float32 additions.
    error = 2.0**-40 if device == "cpu" else 2.0**-22
    root_mean_square = exact.square().mean(0).sqrt()
    assert ((total - exact.sum(0)).abs() / tokens <= error * root_mean_square).all()


def test_means_equal_a_reference_in_loops() -> None:
    keys = torch.stack([random_keys(700, seed=layer) for layer in range(L)])
    heads = random_heads(700)
    sums = sums_of(keys, heads)
    mean, attended = torch.zeros(L, G, D), torch.zeros(L, H, D)
    for layer, g, i in np.ndindex(L, G, D):
        mean[layer, g, i] = math.fsum(map(float, keys[layer, :, g, i])) / 700
        for head in range(H // G):
            pairs = zip(keys[layer, :, g, i], heads[layer, :, g], strict=True)
            own = [float(key) for key, h in pairs if h == head]
            attended[layer, g * (H // G) + head, i] = math.fsum(own) / len(own)
    # Rounded once from float64, so at most one unit in the last place from the correctly rounded mean.
    torch.testing.assert_close(sums.mean(), mean, rtol=2.0**-22, atol=0)
    torch.testing.assert_close(sums.attended(), attended, rtol=2.0**-22, atol=0)
    assert sums.mean().dtype == sums.attended().dtype == torch.float32 and sums.tokens == 700


def test_integers_give_the_exact_mean_bitwise() -> None:
    """Small integers add without rounding, so every way of adding must give the same bits."""
    keys = torch.randint(-50, 50, (L, 1024, G, D)).float()
    sums = sums_of(keys)
    assert torch.equal(sums.mean(), keys.double().mean(1).float())
    assert torch.equal(sums.attended(), sums.mean())  # a head a group: the paper's keys
    assert torch.equal(sums_of(keys, random_heads(1024)).mean(), sums.mean())


def test_a_head_without_tokens_has_its_groups_mean_key() -> None:
    sums = sums_of(random_keys(9)[None], torch.zeros(1, 9, G, dtype=torch.int64))
    assert torch.equal(sums.attended(), sums.mean().repeat_interleave(H // G, dim=1))


@settings(max_examples=40, deadline=None)
@given(
    tensor_parallel=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 3]),
    token_cuts=st.lists(st.integers(0, 90), max_size=4),
    seed=st.integers(0, 9),
)
def test_merging_ranks_equals_one_rank(
    tensor_parallel: int, pipeline: int, token_cuts: list[int], seed: int
) -> None:
    """Heads, layers and tokens divided among ranks in any way: bitwise what one rank has."""
    keys = torch.randint(-50, 50, (L, 90, G, D), generator=torch.Generator().manual_seed(seed)).float()
    heads = random_heads(90)
    whole = sums_of(keys, heads)
    bounds = sorted({0, 90, *token_cuts})
    merged = KeySums(L, H, G, D)
    for first, last in zip(bounds, bounds[1:], strict=False):  # data or context parallel
        for stage in range(pipeline):
            for rank in range(tensor_parallel):
                own = KeySums(L, H, G, D)
                groups = slice(rank * G // tensor_parallel, (rank + 1) * G // tensor_parallel)
                for layer in range(stage, L, pipeline):  # interleaved, as under virtual stages
                    keys_of, heads_of = (part[layer, first:last, groups] for part in (keys, heads))
                    own.add(layer, groups.start, keys_of, heads_of)
                merged.total += own.total  # what all_reduce does
                merged.count += own.count
    for found, expected in ((merged.total, whole.total), (merged.count, whole.count)):
        assert torch.equal(found, expected)


def test_keys_come_as_sequence_and_batch_or_packed() -> None:
    keys = torch.randint(-9, 9, (6, 2, G, D)).float()  # (sequence, batch, groups, d)
    heads = torch.randint(H // G, (6, 2, G))
    whole = KeySums(1, H, G, D)
    whole.add(0, 0, keys, heads)
    packed = sums_of(keys.flatten(0, 1)[None], heads.flatten(0, 1)[None])
    assert torch.equal(whole.total, packed.total) and whole.tokens == packed.tokens == 12


def test_sums_over_a_part_of_the_model_are_refused() -> None:
    sums = KeySums(L, G, G, D)
    with pytest.raises(RuntimeError, match="layer 0, query group 0 saw 0 tokens"):
        sums.mean()
    for layer in range(L):
        sums.add(layer, 0, random_keys(8), None)
    sums.add(1, 2, random_keys(8)[:, 2:], None)
    with pytest.raises(RuntimeError, match="saw 8 tokens where 16 are expected"):
        sums.mean()


def some_stats() -> key_stats_file.KeyStats:
    mean, attended = (torch.stack([random_keys(1, n, seed=i)[0] for i in range(L)]) for n in (G, H))
    metadata = METADATA | {"checkpoint": "a/b", "versions": {"torch": "2"}, "config": None}
    return key_stats_file.KeyStats(mean, torch.full((L,), 64), attended, metadata)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
    safetensors.torch.save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    stats, path = some_stats(), tmp_path / "new folder" / "stats.safetensors"
    key_stats_file.save(path, stats)
    loaded = key_stats_file.load(path)
    for name in ("mean", "attended", "count"):
        assert torch.equal(getattr(loaded, name), getattr(stats, name))
    assert loaded.metadata == stats.metadata | {"format": key_stats_file.FORMAT}
    assert os.listdir(path.parent) == [path.name]


def test_files_of_format_1_load(tmp_path) -> None:
    """They had no attended keys, and a mean of squares."""
    stats = some_stats()
    tensors = {"key_mean": stats.mean, "key_square_mean": stats.mean.square(), "key_count": stats.count}
    write(tmp_path / "old", tensors, METADATA | {"format": 1})
    loaded = key_stats_file.load(tmp_path / "old")
    assert torch.equal(loaded.mean, stats.mean) and loaded.attended is None


def test_existing_output_is_replaced_with_overwrite_and_whole_only(tmp_path, monkeypatch) -> None:
    path = tmp_path / "stats.safetensors"
    key_stats_file.save(path, some_stats())
    before, changed = path.read_bytes(), some_stats()
    changed.mean += 1
    with pytest.raises(UserError, match=r"--output .*exists; pass --overwrite"):
        key_stats_file.save(path, changed)
    with monkeypatch.context() as full, pytest.raises(UserError, match="No space left on device"):
        full.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        key_stats_file.save(path, changed, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    key_stats_file.save(path, changed, overwrite=True)
    assert torch.equal(key_stats_file.load(path).mean, changed.mean)


def test_output_that_cannot_be_written_is_refused_early(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists; .* a file, or name another"):
        key_stats_file.check_output(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="cannot write in"):
        key_stats_file.check_output(tmp_path / "file" / "stats.safetensors")
    key_stats_file.check_output(tmp_path / "new" / "stats.safetensors")
    assert os.listdir(tmp_path) == ["file"]


# What is said of a good file -> what is done to its tensors and metadata.
BROKEN: dict[str, Callable[[dict, dict], object]] = {
    "key_count is not there": lambda tensors, _: tensors.pop("key_count"),
    "key_attended is not there": lambda tensors, _: tensors.pop("key_attended"),
    "key_mean is torch.float16": lambda tensors, _: tensors.update(key_mean=tensors["key_mean"].half()),
    r"key_mean is torch.float32 \[4, 5\]": lambda tensors, _: tensors.update(key_mean=tensors["key_mean"][0]),
    "key_mean holds NaN": lambda tensors, _: tensors["key_mean"][1, 2, 3].fill_(math.nan),
    "key_attended holds NaN or inf": lambda tensors, _: tensors["key_attended"][0, 0, 0].fill_(math.inf),
    r"key_attended is .* \[3, 2, 5\]": lambda tensors, _: tensors.update(key_attended=torch.ones(L, 2, D)),
    r"key_count is .* \[2\]": lambda tensors, _: tensors.update(key_count=tensors["key_count"][:2].clone()),
    "layers without tokens": lambda tensors, _: tensors["key_count"][1].fill_(0),
    "router_input is": lambda tensors, _: tensors.update(router_input=torch.ones(L - 1, 2, 7)),
    "not key statistics of format 1 or 2": lambda _, metadata: metadata.update(format=99),
    r"ask for torch.float32 \[3, 5, 5\]": lambda _, metadata: metadata.update(num_query_groups=5),
    "key_source 'post_rope' is not pre_rope": lambda _, metadata: metadata.update(key_source="post_rope"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_load_refuses(message: str, tmp_path) -> None:
    path, stats = tmp_path / "stats.safetensors", some_stats()
    assert stats.attended is not None
    tensors = {"key_mean": stats.mean, "key_attended": stats.attended, "key_count": stats.count}
    metadata = stats.metadata | {"format": key_stats_file.FORMAT}
    BROKEN[message](tensors, metadata)
    write(path, tensors, metadata)
    with pytest.raises(UserError, match=f"--key-stats {path}: .*{message}") as error:
        key_stats_file.load(path)
    assert "\n" not in str(error.value)
