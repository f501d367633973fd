"""Gates made of samples of router inputs: clusters of them, and several texts told apart. Pure tensors.

Symbols: S tokens of all texts, D hidden size, n experts, k texts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_router_upcycling.errors import UserError

KMEANS_ROUNDS = 50


def cluster_centres(inputs: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Centres of ``count`` clusters of the directions of ``inputs`` [S, D]: spherical k-means, float64.

    Starts from tokens drawn at random. A cluster that loses all its tokens takes the token that is least
    similar to its nearest centre.
    """
    unit = torch.nn.functional.normalize(inputs.double(), dim=1)
    centres = unit[torch.randperm(len(unit), generator=random)[:count]]
    for _ in range(KMEANS_ROUNDS):
        likeness, nearest = (unit @ centres.t()).max(dim=1)
        moved = torch.zeros_like(centres).index_add_(0, nearest, unit)
        for empty in (torch.bincount(nearest, minlength=count) == 0).nonzero().flatten().tolist():
            stray = int(likeness.argmin())
            moved[empty], likeness[stray] = unit[stray], 2.0
        moved = torch.nn.functional.normalize(moved, dim=1)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def gate(
    kind: str, samples: Sequence[Tensor], num_experts: int, random: Callable[[int], torch.Generator]
) -> Tensor:
    """A gate [n, D] in float64 that sends each text's tokens to its own experts, of any scale.

    Expert i is of text i mod k. Where a text has several experts, its tokens are clustered, one cluster an
    expert. ``domain``: the mean input of an expert's tokens minus the mean of all (mergekit-moe's "hidden"
    mode). ``ridge``: the least squares fit of the tokens' experts, centred, to their inputs, with the mean
    eigenvalue of the inputs' second moment as the penalty (arXiv 2603.29765).

    ``samples``: inputs [S/k, D] of each text. ``random``: the generator of a text's clusters.
    """
    owner = torch.cat(
        [_experts(one, text, len(samples), num_experts, random) for text, one in enumerate(samples)]
    )
    inputs = torch.cat([*samples]).double()
    chosen = torch.nn.functional.one_hot(owner, num_experts).double()  # [S, n]
    if kind == "domain":
        return (chosen / chosen.sum(dim=0).clamp(min=1)).t() @ inputs - inputs.mean(dim=0)
    moment = inputs.t() @ inputs
    penalty = moment.diagonal().mean()
    moment.diagonal().add_(penalty)
    return torch.linalg.solve(moment, inputs.t() @ (chosen - chosen.mean(dim=0))).t()


def _experts(
    inputs: Tensor, text: int, num_texts: int, num_experts: int, random: Callable[[int], torch.Generator]
) -> Tensor:
    """The expert of each token of a text, [S/k]."""
    count = num_experts // num_texts
    if len(inputs) < count:
        raise UserError(
            f"--key-stats: {len(inputs)} tokens of a text are too few for {count} experts; collect more with"
            " --router-samples"
        )
    unit = torch.nn.functional.normalize(inputs.double(), dim=1)
    nearest = (unit @ cluster_centres(inputs, count, random(text)).t()).argmax(dim=1)
    return text + num_texts * nearest
