"""The coefficient in config.json gives routers the gradients that Megatron's loss gave them.

transformers' loss and Megatron's, both as their libraries have them.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.hf import model_card
from tests import dense_checkpoint, hf_models
from tests.hf.folders import make_moe, run, write_moe

EXPERTS, TOKENS = 8, 64


def counts(logits: Tensor, k: int) -> Tensor:
    """How many tokens choose each expert, [n]."""
    return torch.bincount(logits.topk(k).indices.flatten(), minlength=logits.shape[1]).float()


def megatron_loss(logits: Tensor, k: int, coefficient: float, chosen: Tensor | None = None) -> Tensor:
    """Megatron's loss of one layer, ``logits`` [T, n]; ``chosen``: counts other than its own."""
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
    )

    routing, scores = compute_routing_scores_for_aux_loss(logits, k, "softmax")
    return switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=routing.sum(0) if chosen is None else chosen,
        total_num_tokens=len(logits),
        topk=k,
        num_experts=logits.shape[1],
        moe_aux_loss_coeff=coefficient,
    )


def gradients(loss: Tensor, layers: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, layers, retain_graph=True))


def layers_of(number: int, alike: bool) -> list[Tensor]:
    """Router logits of ``number`` layers; ``alike``: of the same tokens in another order."""
    generator = torch.Generator().manual_seed(number)
    bias = torch.randn(EXPERTS, generator=generator)
    first = torch.randn(TOKENS, EXPERTS, generator=generator) + bias
    layers = [first] + [
        first[torch.randperm(TOKENS, generator=generator)]
        if alike
        else torch.randn(TOKENS, EXPERTS, generator=generator) + torch.randn(EXPERTS, generator=generator)
        for _ in range(number - 1)
    ]
    return [layer.clone().requires_grad_() for layer in layers]


def transformers_gradients(layers: list[Tensor], k: int) -> list[Tensor]:
    coefficient = model_card.loss_coefficient({"aux_loss": 0.01}, len(layers), k)
    return gradients(coefficient * load_balancing_loss_func(tuple(layers), EXPERTS, k), layers)


def megatron_gradients(layers: list[Tensor], k: int, chosen: Tensor | None = None) -> list[Tensor]:
    return gradients(torch.stack([megatron_loss(one, k, 0.01, chosen) for one in layers]).sum(), layers)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("number", [1, 3])
def test_gradients_are_equal_where_layers_load_their_experts_alike(number: int, k: int) -> None:
    layers = layers_of(number, alike=True)
    for one, other in zip(transformers_gradients(layers, k), megatron_gradients(layers, k), strict=True):
        assert other.abs().max() > 1e-7
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)


def test_elsewhere_they_are_those_of_the_mean_load() -> None:
    layers = layers_of(3, alike=False)
    mean = torch.stack([counts(layer, 2) for layer in layers]).mean(0)
    expected, own = megatron_gradients(layers, 2, mean), megatron_gradients(layers, 2)
    for one, other, apart in zip(transformers_gradients(layers, 2), expected, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)
        assert not torch.allclose(one, apart, rtol=1e-2)


def balanced_moe(folder: Path, *options: object, **balance: Any) -> Path:
    """An exported model that was trained with a load balancing loss."""
    checkpoint = open_checkpoint(make_moe(folder, 31, "--router", "linear", "--num-experts", 4, *options))
    tensors = dense_checkpoint.read_back(checkpoint.iteration_dir)
    write_moe(folder / "balanced", tensors, Namespace(**vars(checkpoint.args) | balance))
    assert run("export-hf", folder / "balanced", folder / "hf") == 0
    return folder / "hf"


def test_a_model_of_one_layer_with_experts_trains_on(tmp_path: Path) -> None:
    """What ``output_router_logits`` adds to the gate's gradient in transformers is Megatron's."""
    model = hf_models.load(balanced_moe(tmp_path, "--layers", "1", moe_aux_loss_coeff=0.02))
    tokens = torch.arange(2 * 12).reshape(2, 12) * 7 % dense_checkpoint.VOCABULARY
    gate = model.model.layers[1].mlp.gate.weight
    plain = model(tokens, labels=tokens).loss
    whole = model(tokens, labels=tokens, output_router_logits=True)
    (logits,) = whole.router_logits
    (found,) = gradients(whole.loss - plain, [gate])
    (expected,) = gradients(megatron_loss(logits, 2, 0.02), [gate])
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_coefficient_and_what_the_card_says_of_it(tmp_path: Path, balanced: bool) -> None:
    kinds, coefficients = ["none", "seq_aux_loss"], [0.02, 0]
    if balanced:
        kinds, coefficients = ["global_aux_loss", "seq_aux_loss"], [0.02, 0.003]
    exported = balanced_moe(tmp_path, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coefficients)
    config = json.loads((exported / "config.json").read_text())
    assert config["router_aux_loss_coef"] == pytest.approx(0.023 * balanced * dense_checkpoint.LAYERS / 2)
    assert config["output_router_logits"] is False
    card = (exported / "README.md").read_text()
    said = "trained with Megatron's `global_aux_loss` 0.02 and `seq_aux_loss` 0.003, added up over 3 layers"
    assert (said in card) == ("only with `output_router_logits=True`" in card) == balanced
