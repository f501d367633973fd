"""``inspect`` of a converted checkpoint: its routers' start beside the paper's equations as loops."""

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from tests import dense_checkpoint
from tests.conftest import HIDDEN, LAYERS

EXPERTS, TOP_K, SAMPLES = 8, 2, 60


def with_samples(path: Path, key_stats_file: Path, samples: torch.Tensor | None, **other: str) -> Path:
    """The session's key statistics with ``samples`` [L, S, D] as what routers see, or with none."""
    with safetensors.safe_open(key_stats_file, framework="pt") as file:
        metadata = file.metadata() | other
    held = safetensors.torch.load_file(key_stats_file).items()
    tensors = {name: value for name, value in held if name != "router_input"}
    given = {} if samples is None else {"router_input": samples.bfloat16()}
    safetensors.torch.save_file(tensors | given, path, metadata)
    return path


def table(text: str) -> list[list[str]]:
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "keys"])
    return [line.split() for line in lines[first + 1 : first + 1 + LAYERS]]


def test_the_table_holds_what_the_equations_give(
    tmp_path: Path, moe: Path, key_stats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = torch.randn(LAYERS, SAMPLES, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    stats = with_samples(tmp_path / "stats.safetensors", key_stats_file, samples)
    assert cli.main(["inspect", str(moe), "--key-stats", str(stats)]) == 0
    text = capsys.readouterr().out
    checkpoint = open_checkpoint(moe)
    for layer, row in enumerate(table(text)):
        query, key = (
            checkpoint.read_layer(f"decoder.layers.mlp.router.{name}", layer, bytearray()).double()
            for name in ("query_weight", "expert_key")
        )
        load, entropy, weights = [0] * EXPERTS, 0.0, 0.0
        for x in samples[layer].double():
            score = [sum(float((w @ x) @ k) for w in query) / math.sqrt(key.shape[1]) for k in key]
            shares = torch.tensor(score).softmax(dim=0).tolist()
            entropy -= sum(p * math.log(p) for p in shares)
            for i in sorted(range(EXPERTS), key=lambda i: -shares[i])[:TOP_K]:
                load[i] += 1
                weights += shares[i]
        pairs = [(a, b) for a in range(EXPERTS) for b in range(a)]
        cosines = [float(torch.cosine_similarity(key[a], key[b], dim=0)) for a, b in pairs]
        assert row[0] == str(layer)
        expected = {1: sum(cosines) / len(cosines), 2: max(cosines), 3: 0, 5: load.count(0)}
        expected |= {6: entropy / SAMPLES, 8: weights / SAMPLES}
        assert {at: float(row[at]) for at in expected} == pytest.approx(expected, abs=1e-3)
        assert float(row[4]) == pytest.approx(max(load) / (SAMPLES * TOP_K / EXPERTS), abs=6e-3)
    assert "tied" not in text
    assert "prepared for softmax after top-k" in text and "softmax after top-k    x 1: no jump" in text
    assert "collapsed" not in text


def test_a_collapsed_start_is_told(
    tmp_path: Path, moe: Path, key_stats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What real Qwen keys do: all hidden states share a large part, which favours the same experts."""
    generator = torch.Generator().manual_seed(4)
    common = 30 * torch.randn(LAYERS, 1, HIDDEN, generator=generator)
    samples = common + torch.randn(LAYERS, SAMPLES, HIDDEN, generator=generator)
    stats = with_samples(tmp_path / "stats.safetensors", key_stats_file, samples)
    assert cli.main(["inspect", str(moe), "--key-stats", str(stats)]) == 0
    text = capsys.readouterr().out
    assert "warning: routing would start collapsed in layers 0, 1, 2, 3: " in text
    assert "hint: some experts would be ahead for all tokens alike in layers 0, 1, 2, 3 (at most 100%" in text
    assert "convert again with --center --equalize (" in text
    assert all(float(row[4]) > 2 and int(row[5]) >= 4 for row in table(text))


def test_a_start_that_is_too_sure_or_too_even_is_told_with_the_flag_that_calibrates_it(
    tmp_path: Path, dense: Path, key_stats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag that inspect prints is given, and then it says no more of it."""

    def inspected(name: str, *flags: str) -> tuple[list[float], list[str]]:
        """Entropies of layers, and hints."""
        capsys.readouterr()
        assert cli.main(["inspect", str(tmp_path / name), *flags]) == 0
        text = capsys.readouterr().out
        hints = [line for line in text.splitlines() if line.startswith("hint: ")]
        return [float(row[6]) for row in table(text)], hints

    samples = torch.randn(LAYERS, SAMPLES, HIDDEN, generator=torch.Generator().manual_seed(5))
    for scale, what, limit in ((1000, "very sure of themselves", 0.29), (1e-3, "next to even", 0.91)):
        stats = with_samples(tmp_path / f"{scale}.safetensors", key_stats_file, scale * samples)
        made = ["--router", "linear", "--key-stats", str(stats), "--quiet"]
        assert cli.main(["convert", str(dense), str(tmp_path / f"{scale}"), *made]) == 0
        entropies, (hint,) = inspected(f"{scale}", "--key-stats", str(stats))
        assert all((entropy < limit * math.log(EXPERTS)) == (limit < 0.5) for entropy in entropies)
        assert f"hint: routers would start {what} in layers 0, 1, 2, 3 (entropies of " in hint
        assert f"{min(entropies):.2f}" in hint and "even routing has 2.08" in hint
        flag = hint.split("convert again with ")[1].split(" (")[0].split()
        assert flag == ["--target-entropy", "1.5"]
        assert cli.main(["convert", str(dense), str(tmp_path / f"calibrated {scale}"), *made, *flag]) == 0
        entropies, hints = inspected(f"calibrated {scale}", "--key-stats", str(stats))
        assert entropies == pytest.approx([1.5] * LAYERS, abs=0.02) and not hints
    # Random tokens route more evenly than real ones, so that they say nothing of the latter.
    entropies, hints = inspected("0.001")
    assert min(entropies) > 1.9 and not hints


def test_recorded_samples_are_taken_and_random_tokens_stand_in(
    tmp_path: Path, moe: Path, dense: Path, key_stats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(moe)]) == 0
    text = capsys.readouterr().out
    assert f"hidden states of the dense model, sampled in {key_stats_file}:" in text
    assert len(table(text)) == LAYERS
    none = with_samples(tmp_path / "none", key_stats_file, None)
    assert cli.main(["inspect", str(moe), "--key-stats", str(none)]) == 0
    text = capsys.readouterr().out
    assert "1024 random tokens, " in text and f"({none} holds no samples; name key statistics" in text
    # What the manifest names is of another model now, or gone.
    foreign = with_samples(tmp_path / "foreign", key_stats_file, None, checkpoint_digest='"0"')
    copied = shutil.copytree(moe, tmp_path / "copied")
    record = json.loads((moe / manifest.NAME).read_text())
    for path, why in ((foreign, "of another model"), (tmp_path / "gone", "no such file")):
        record["key_stats"]["path"] = str(path)
        (copied / manifest.NAME).write_text(json.dumps(record))
        assert cli.main(["inspect", str(copied)]) == 0
        assert f"than real ones (--key-stats {path}: {why};" in capsys.readouterr().out
    linear = tmp_path / "linear"
    assert cli.main(["convert", str(dense), str(linear), "--router", "linear", "--layers", "1,3"]) == 0
    assert cli.main(["inspect", str(linear)]) == 0
    text = capsys.readouterr().out
    assert "1024 random tokens" in text
    assert [row[:3] for row in table(text)[:2]] == [["1", "–", "–"], ["3", "–", "–"]]


def test_mistakes(
    tmp_path: Path, moe: Path, dense: Path, key_stats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = with_samples(tmp_path / "narrow", key_stats_file, torch.zeros(LAYERS, 4, HIDDEN // 2))
    short = with_samples(tmp_path / "short", key_stats_file, torch.zeros(LAYERS - 1, 4, HIDDEN))
    foreign = with_samples(tmp_path / "foreign", key_stats_file, None, checkpoint_digest='"0"')
    for checkpoint, stats, message in (
        (moe, narrow, "[4, 4, 32] and the model has 4 layers of width 64"),
        (moe, short, "router_input is [3, 4, 64]"),
        (moe, foreign, "of another model"),
        (dense, narrow, "has no routers"),
        (moe, tmp_path / "nowhere", "no such file"),
    ):
        assert cli.main(["inspect", str(checkpoint), "--key-stats", str(stats)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --key-stats {stats}: ") and message in error


def test_a_gain_that_is_stored_as_its_distance_from_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--apply-layernorm-1p: two checkpoints whose norms Megatron takes for the same start alike."""
    name = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    shape = (dense_checkpoint.LAYERS, dense_checkpoint.HIDDEN)
    gains = torch.randint(32, 256, shape, generator=torch.Generator().manual_seed(6)) / 64
    tables = []
    for centered, stored in ((False, gains), (True, gains - 1), (False, gains - 1)):
        root = tmp_path / f"{centered} {float(stored.sum())}"
        args = dense_checkpoint.arguments(normalization="LayerNorm", layernorm_zero_centered_gamma=centered)
        values = dense_checkpoint.tensors() | {name: stored}
        norms = [key for key in values if "norm" in key]
        values |= {key.replace("weight", "bias"): torch.zeros_like(values[key]) for key in norms}
        dense_checkpoint.write(root / "dense", values, args=args)
        flags = ["--router", "linear", "--num-experts", "4", "--quiet"]
        assert cli.main(["convert", str(root / "dense"), str(root / "moe"), *flags]) == 0
        assert cli.main(["inspect", str(root / "moe")]) == 0
        said = capsys.readouterr().out
        tables.append(said[said.index("routing at the start") :].splitlines()[:5])
    plain, same, other = tables
    assert plain == same != other and "1024 random tokens" in plain[0]
