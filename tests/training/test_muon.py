"""Muon takes each matrix by itself, however many lie in one parameter, and goes on at another layout."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("emerging_optimizers")

from megatron.core import optimizer
from megatron.core.optimizer import emerging_optimizers as megatrons

from megatron_router_upcycling.layers import STACK
from megatron_router_upcycling.training.patches.optimizer import install_muon
from tests import launch, pretrain_as_asked

FLAGS = ("--optimizer", "muon", "--train-iters", 4, "--eval-iters", 0, "--global-batch-size", 16)


def stepped(parameters: list[torch.nn.Parameter], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Their values after two steps of Megatron's Muon."""
    muons = megatrons.TensorParallelMuon(parameters, lr=0.1, tp_mode="blockwise")
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        muons.step()
    return [parameter.data for parameter in parameters]


@pytest.mark.parametrize("shape", [(4, 24, 16), (4, 16, 24)])
def test_a_stack_is_updated_as_its_matrices_would_be(shape: tuple[int, ...]) -> None:
    install_muon()
    generator = torch.Generator().manual_seed(0)
    values, *gradients = (torch.randn(shape, generator=generator) for _ in range(3))
    (stack,) = stepped([torch.nn.Parameter(values.clone())], [[gradient] for gradient in gradients])
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in values]
    alone = stepped(singles, [list(gradient) for gradient in gradients])
    assert torch.equal(stack, torch.stack(alone))


def test_what_is_marked_as_a_stack_is_muons_and_other_parameters_of_three_axes_are_not() -> None:
    install_muon()
    matrix, vector, stack, kernel = (torch.nn.Parameter(torch.zeros(*(2,) * axes)) for axes in (2, 1, 3, 3))
    embedding = torch.nn.Parameter(torch.zeros(2, 2))
    embedding.is_embedding_or_output_parameter = True
    setattr(stack, STACK, True)
    parameters = (matrix, vector, stack, kernel, embedding)
    (key,) = megatrons._EMERGING_OPTIMIZERS["muon"].default_param_overrides
    assert [not key.matches(p, "name") for p in parameters] == [True, False, True, False, False]
    managed = [optimizer.is_managed_by_layer_wise_optimizer(p) for p in parameters]
    assert managed == [True, False, True, False, False]


@pytest.mark.slow
def test_grouped_experts_train_as_single_ones_do(moe: Path, moe_config: Path) -> None:
    """Muon enlarges rounding, on some processors to 1.4e-5; were stacks Adam's, losses were 1e-2 apart."""
    program, common = str(pretrain_as_asked.__file__), ("--config", moe_config, "--load", moe, *FLAGS)
    single, grouped = (launch.ranks(1, program, *common, *f).ok() for f in ((), ("--moe-grouped-gemm",)))
    assert "GroupedExperts" in grouped.text and "SequentialMLP" in single.text
    assert len(grouped.losses) == len(single.losses) == 4
    for step, bound in ((1, 1e-5), (2, 1e-5), (3, 1e-5), (4, 1e-4)):
        assert grouped.losses[step] == pytest.approx(single.losses[step], rel=bound)


@pytest.mark.slow
def test_a_run_goes_on_at_another_layout(tmp_path: Path, moe: Path, moe_config: Path) -> None:
    common = ("--config", moe_config, *FLAGS)
    saving = ("--load", moe, "--save", tmp_path, "--save-interval", 2, "--expert-model-parallel-size", 2)
    losses = launch.ranks(2, "pretrain", *common, *saving).ok().losses
    for ranks, layout, tolerance in (
        (1, (), 1e-5),
        (2, ("--expert-model-parallel-size", 2), 0),
        # Megatron orthogonalises the part of each tensor-parallel rank alone.
        (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel"), 1e-3),
    ):
        resumed = ("--load", tmp_path, "--ckpt-step", 2, *layout)
        found = launch.ranks(ranks, "pretrain", *common, *resumed).ok().losses
        assert found == pytest.approx({step: losses[step] for step in (3, 4)}, rel=tolerance)
