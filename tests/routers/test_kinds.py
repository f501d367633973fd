"""Each kind of router, as its row says it, as Megatron trains it and as transformers loads it."""

import ast
import pathlib

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.planning import figures
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig
from tests import dense_checkpoint, hf_models
from tests.dense_checkpoint import HEAD_DIM, HEADS
from tests.hf.folders import make_moe, refused, run
from tests.router_kinds import EXPERTS, KINDS, D, Values
from tests.routers.conftest import build, transformer_config

pytestmark = pytest.mark.usefixtures("on_cpu")

SIZES = {"hidden_size": D, "num_attention_heads": HEADS, "kv_channels": HEAD_DIM}
all_kinds = pytest.mark.parametrize("kind", kinds.KINDS)


def options(kind: str) -> RouterConfig:
    return RouterConfig(router=kind, num_experts=EXPERTS, top_k=KINDS[kind].top_k)


def reference(kind: str, values: Values, tokens: torch.Tensor) -> torch.Tensor:
    doubles = {name: value.detach().double() for name, value in values.items()}
    rows = [KINDS[kind].logits(doubles, token, EXPERTS) for token in tokens.detach().double()]
    return torch.tensor(rows, dtype=torch.float64)


def seen(count: int = 20) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def test_every_kind_has_a_row_here_and_no_other_file_asks_for_it_by_its_name() -> None:
    assert list(KINDS) == list(kinds.KINDS)
    package = pathlib.Path(kinds.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = (part for part in ast.walk(node.comparators[0]) if isinstance(part, ast.Constant))
                named = {constant.value for constant in constants}
                assert not named & KINDS.keys(), f"{path}:{node.lineno}"


@all_kinds
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_megatrons_and_the_plans(kind: str, bias: bool) -> None:
    """Of the row, of the class that trains and of ``plan`` (whose count of an MLP router lacked the bias)."""
    expected = KINDS[kind].shapes | ({"bias": (EXPERTS,)} if bias and KINDS[kind].bias else {})
    config = transformer_config(**SIZES, add_bias_linear=bias, moe_router_topk=KINDS[kind].top_k)
    assert {p.name: p.shape for p in kinds.all_parameters(options(kind), config, bias)} == expected
    made = build(options(kind), config)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == expected
    assert {name for name in made.state_dict() if not name.endswith("_extra_state")} == set(expected)
    experts = {"num_experts": EXPERTS, "expert_tensor_parallel_size": 1, "router": options(kind)}
    planned = figures.parameters(Setup(num_layers=1, **SIZES, add_bias_linear=bias, **experts), 0)
    assert planned["routers"] == sum(p.numel() for p in made.parameters())


@all_kinds
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_of_the_models_dtype_and_marked(kind: str, sequence_parallel: bool) -> None:
    dtype = {"params_dtype": torch.bfloat16, "bf16": True}
    config = transformer_config(**dtype, add_bias_linear=True, moe_router_topk=KINDS[kind].top_k)
    config.sequence_parallel = sequence_parallel
    for parameter in build(options(kind), config).parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.sequence_parallel is sequence_parallel


@all_kinds
def test_logits_are_the_methods(kind: str) -> None:
    """The row's, folded as an export folds them, and those of the class that trains."""
    config = transformer_config(**SIZES, moe_router_topk=KINDS[kind].top_k)
    made = build(options(kind), config)
    values, row = dict(made.named_parameters()), kinds.get(kind)
    expected = reference(kind, values, seen())
    gate = row.gate(values, options(kind), D, torch.float64)
    found = row.logits(gate, seen().double(), options(kind))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    rounded = seen().bfloat16()
    trained = made.gating(rounded[:, None])[:, 0]
    assert trained.dtype == torch.float32
    torch.testing.assert_close(trained.double(), reference(kind, values, rounded), rtol=1e-4, atol=1e-4)
    shapes = {name: tuple(value.shape) for name, value in gate.items()}
    assert kinds.gate_shapes(options(kind), config) == shapes
    assert (row.not_stock(options(kind)) is None) == KINDS[kind].stock
    if KINDS[kind].stock:
        assert shapes == {"weight": (EXPERTS, D)}


@all_kinds
def test_transformers_has_the_logits(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    row = KINDS[kind]
    moe = make_moe(tmp_path, 5, "--num-experts", EXPERTS, "--router", kind)
    if not row.stock:
        assert "no stock class computes" in refused(capsys, "export-hf", moe, tmp_path / "hf")
    assert run("export-hf", moe, tmp_path / "hf", *() if row.stock else ("--modelling-code",)) == 0
    source = dense_checkpoint.read_back(open_checkpoint(moe).iteration_dir)
    model = hf_models.load(tmp_path / "hf", trust_remote_code=not row.stock)
    for layer in range(dense_checkpoint.LAYERS):
        values = {name: source[f"decoder.layers.mlp.router.{name}"][layer] for name in row.shapes}
        expected = reference(kind, values, seen())
        logits, scores, chosen = model.model.layers[layer].mlp.gate(seen())
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        shares = expected.softmax(dim=1).gather(1, chosen)
        torch.testing.assert_close(scores.double(), shares, rtol=1e-5, atol=1e-6)
