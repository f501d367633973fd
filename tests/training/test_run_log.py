"""Measures of routing beside loops, the files of a run, and what a real run wrote."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_router_upcycling.layers.statistics import routing_sums
from megatron_router_upcycling.routers import likeness
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.run_log import files, measures
from megatron_router_upcycling.training.run_log.collector import RARE
from megatron_router_upcycling.training.run_log.listener import RunLog

TOKENS, EXPERTS, TOP_K, HIDDEN = 40, 6, 2, 16


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("pre_softmax", [True, False], ids=["softmax, top-k", "top-k, softmax"])
def test_routing_sums_add_up_to_what_loops_find(random: torch.Generator, pre_softmax: bool) -> None:
    logits = 2 * torch.randn(TOKENS, EXPERTS, generator=random)
    logits[:, 3] = -50.0  # a dead expert
    parts = [measures.choose(part, TOP_K, pre_softmax) for part in logits.split(10)]
    dropped = int(parts[0][2][0].sum())
    parts[0][2][0] = False  # what capacity does to the first token
    parts[0][1][0] = 0.0
    found = measures.summarise(sum(routing_sums(*part, top_k=TOP_K).double() for part in parts))

    load, expected = [0] * EXPERTS, {"entropy": 0.0, "top1_probability": 0.0, "weight_sum": 0.0}
    for token, row in enumerate(logits.double().tolist()):
        total = sum(math.exp(x) for x in row)
        scores = [math.exp(x) / total for x in row]
        expected["entropy"] -= sum(p * math.log(p) for p in scores) / TOKENS
        expected["top1_probability"] += max(scores) / TOKENS
        chosen = sorted(range(EXPERTS), key=lambda i: -row[i])[:TOP_K]
        if token:
            expected["weight_sum"] += (sum(scores[i] for i in chosen) if pre_softmax else 1.0) / TOKENS
            for i in chosen:
                load[i] += 1
    mean = sum(load) / EXPERTS
    deviation = math.sqrt(sum((count - mean) ** 2 for count in load) / EXPERTS)
    expected |= {"load_max_over_mean": max(load) / mean, "load_cv": deviation / mean, "dead_experts": 1}
    expected |= {"dropped_fraction": dropped / (TOKENS * TOP_K)}
    assert found.pop("load") == pytest.approx([count / sum(load) for count in load])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pooling", ["sum", "max"])
@pytest.mark.parametrize("keys", [1, 2])
def test_agreement_and_gates_beside_loops(random: torch.Generator, pooling: str, keys: int) -> None:
    m, width = 3, 4
    query = torch.randn(m, width, HIDDEN, generator=random)
    key = torch.randn(EXPERTS * keys, width, generator=random)
    tokens = torch.randn(TOKENS, HIDDEN, generator=random)

    def first(scores: torch.Tensor) -> int:  # [n*c]
        return int(scores.argmax()) // keys

    agreed = 0
    for x in tokens:
        alone = torch.stack([key @ (query[j] @ x) for j in range(m)])
        pooled = first(alone.sum(dim=0) if pooling == "sum" else alone.amax(dim=0))
        agreed += sum(first(scores) == pooled for scores in alone)
    options = RouterConfig(num_experts=EXPERTS, pooling=pooling)
    assert likeness.router_agreement(tokens, query, key, options) == pytest.approx(agreed / (TOKENS * m))
    gates = [key @ query[j] for j in range(m)]
    gates = [(gate - gate.mean(dim=0)).flatten() for gate in gates]
    cosine = torch.nn.functional.cosine_similarity
    cosines = [float(cosine(gates[a], gates[b], dim=0)) for a in range(m) for b in range(a)]
    assert likeness.gate_cosine(query, key) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_spread_is_the_root_mean_square_distance_of_pairs(random: torch.Generator) -> None:
    experts = torch.randn(5, HIDDEN, generator=random, dtype=torch.float64)
    squares = [float((a - b).square().sum()) for i, a in enumerate(experts) for b in experts[:i]]
    expected = math.sqrt(sum(squares) / len(squares) / float(experts.square().sum(dim=1).mean()))
    assert measures.spread(experts.sum(dim=0), float(experts.square().sum()), 5) == pytest.approx(expected)
    same = experts[:1].expand(5, -1)
    assert measures.spread(same.sum(dim=0), float(same.square().sum()), 5) == pytest.approx(0.0, abs=1e-7)


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run" / files.RUN
    for iteration in (2, 4, 6):
        files.append(path, {"iteration": iteration, "lm_loss": math.nan if iteration == 2 else 4.00000001})
    with path.open("a") as file:
        file.write('{"iteration": 8, "lm_l')  # a crash
    assert [line["iteration"] for line in files.read(path)] == [2, 4, 6]
    files.keep_until(path, 4)
    files.append(path, {"iteration": 6, "lm_loss": 3.5})
    expected = {2: None, 4: 4.0, 6: 3.5}
    assert files.read(path) == [{"iteration": i, "lm_loss": loss} for i, loss in expected.items()]


def test_a_line_has_the_mean_since_the_one_before() -> None:
    log = Namespace(args=Namespace(log_interval=4), _tokens=lambda: 16)
    given = {"iteration": 4, "skipped_iter": 0, "learning_rate": 0.1, "grad_norm": None}
    given |= {"loss_dict": {"lm loss": 4.5}, "total_loss_dict": {"lm loss": 3.0, "advanced iterations": 2}}
    line = RunLog._losses(log, given)  # of the four, one was skipped
    assert line is not None and (line["lm_loss"], line["over"], line["tokens"]) == (2.5, 3, 16)
    assert not any(RunLog._losses(log, given | other) for other in ({"iteration": 3}, {"skipped_iter": 1}))


def test_a_run_writes_its_losses_and_what_its_routers_did(unbroken: tuple[Path, dict[int, float]]) -> None:
    save, losses = unbroken
    lines = files.read(save / files.RUN)
    train = [line for line in lines if line["kind"] == "train"]
    assert {line["iteration"]: line["lm_loss"] for line in train} == pytest.approx(losses, rel=1e-6)
    assert [line["tokens"] for line in train] == [8 * 32 * iteration for iteration in range(1, 9)]
    held_out = [(line["iteration"], line["set"]) for line in lines if line["kind"] == "held_out"]
    assert held_out == [(8, "validation")]
    routing = files.read(save / files.ROUTING)
    assert [line["iteration"] for line in routing] == list(range(1, 9))
    for line in routing:
        assert line["layers"] == [0, 1, 2, 3]
        assert [sum(load) for load in line["load"]] == pytest.approx([1.0] * 4, abs=1e-5)
        assert line["weight_sum"] == pytest.approx([1.0] * 4, abs=1e-5)  # top-k, then softmax
        assert line["dropped_fraction"] == [0.0] * 4
        assert all(0 < entropy <= math.log(8) + 1e-4 for entropy in line["entropy"])
        assert all(0.9 < loss < 3 for loss in line["load_balancing_loss"]) and min(line["z_loss"]) > 0
    first, last = routing[0]["rare"], routing[-1]["rare"]
    assert set(first) == set(last) == set(RARE)
    for before, after in zip(first["expert_distance"], last["expert_distance"], strict=True):
        assert 0 <= before < after < 1  # equal copies move apart
    for name in ("router_drift", "query_weight_drift", "expert_key_drift"):
        assert all(0 < before < after for before, after in zip(first[name], last[name], strict=True))
