"""The kinds of router that the tests go through, a row each, written from the paper, not from the package."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests import dense_checkpoint
from tests.dense_checkpoint import HEAD_DIM, HEADS

EXPERTS = 8
D = dense_checkpoint.HIDDEN
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RouterKind:
    """``shapes``: of one layer's parameters for the model of ``dense_checkpoint``, 8 experts and 8 routers.

    ``logits``: of one token [D], float64, as the method is defined; n numbers.
    """

    shapes: dict[str, tuple[int, ...]]
    logits: Callable[[Values, torch.Tensor, int], list[float]]
    bias: bool = True  # where Megatron's linear layers have one
    top_k: int = 2
    stock: bool = True  # a stock class of transformers holds it


def linear(values: Values, x: torch.Tensor, n: int) -> list[float]:
    return [float(values["weight"][i] @ x) for i in range(n)]


def mixture(values: Values, x: torch.Tensor, n: int) -> list[float]:
    """Eq. 6-8, one key an expert."""
    keys = values["expert_key"]
    return [
        sum(float((w @ x) @ keys[i]) / math.sqrt(keys.shape[1]) for w in values["query_weight"])
        for i in range(n)
    ]


def mlp(values: Values, x: torch.Tensor, n: int) -> list[float]:
    hidden = values["fc1.weight"] @ x
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return [float(values["fc2.weight"][i] @ hidden) for i in range(n)]


def locmoe(values: Values, x: torch.Tensor, n: int) -> list[float]:
    width = len(x) // n
    return [sum(float(x[i * width + j]) for j in range(width)) / width for i in range(n)]


KINDS = {
    "mixture": RouterKind(
        {"query_weight": (8, HEADS * HEAD_DIM // 8, D), "expert_key": (8, HEADS * HEAD_DIM // 8)}, mixture
    ),
    "linear": RouterKind({"weight": (8, D)}, linear),
    "mlp": RouterKind({"fc1.weight": (D, D), "fc2.weight": (8, D)}, mlp, stock=False),
    "switch": RouterKind({"weight": (8, D)}, linear, top_k=1),
    "locmoe": RouterKind({}, locmoe, bias=False),
}
