"""Gates that tell texts apart, against loops and a plain least-squares solver."""

import pytest
import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation import domains

TEXTS, TOKENS, HIDDEN = 3, 40, 12


def random(text: int) -> torch.Generator:
    return torch.Generator().manual_seed(text)


@pytest.fixture
def samples() -> list[torch.Tensor]:
    """Each text's tokens lie apart along an axis of their own."""
    made = [torch.randn(TOKENS + text, HIDDEN, generator=random(text)) for text in range(TEXTS)]
    return [sample + 6 * torch.eye(HIDDEN)[text] for text, sample in enumerate(made)]


def test_domain_is_the_mean_of_a_text_less_the_mean_of_all(samples: list[torch.Tensor]) -> None:
    every = [token.double() for sample in samples for token in sample]
    mean = sum(every) / len(every)
    wanted = [sum(token.double() for token in sample) / len(sample) - mean for sample in samples]
    torch.testing.assert_close(domains.gate("domain", samples, TEXTS, random), torch.stack(wanted))


def test_ridge_is_a_penalised_least_squares_fit(samples: list[torch.Tensor]) -> None:
    """Which an ordinary one becomes with D more rows, sqrt(penalty) on the diagonal, whose target is 0."""
    inputs = torch.cat(samples).double()
    target = torch.zeros(len(inputs), TEXTS, dtype=torch.float64)
    start = 0
    for text, sample in enumerate(samples):
        target[start : start + len(sample), text] = 1
        start += len(sample)
    penalty = torch.linalg.eigvalsh(inputs.t() @ inputs).mean()
    more = penalty.sqrt() * torch.eye(HIDDEN, dtype=torch.float64)
    rows = torch.cat([inputs, more]), torch.cat([target - target.mean(dim=0), torch.zeros(HIDDEN, TEXTS)])
    wanted = torch.linalg.lstsq(*rows).solution.t()
    torch.testing.assert_close(domains.gate("ridge", samples, TEXTS, random), wanted)


@pytest.mark.parametrize("kind", ["domain", "ridge"])
def test_experts_of_one_text_share_its_tokens(samples: list[torch.Tensor], kind: str) -> None:
    """Expert i is of text i mod k, and no two have one row."""
    gate = domains.gate(kind, samples, 2 * TEXTS, random)
    for text, sample in enumerate(samples):
        chosen = (sample.double() @ gate.t()).argmax(dim=1)
        assert (chosen % TEXTS == text).double().mean() > 0.9, (kind, text)
    assert torch.pdist(gate).min() > 1e-3


def test_too_few_tokens_are_named(samples: list[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="1 tokens of a text are too few for 2 experts"):
        domains.gate("domain", [sample[:1] for sample in samples], 2 * TEXTS, random)
