"""The paper's baselines in Megatron's MoE layer (arXiv 2509.00679, section 4.3).

Each is a ``TopKRouter`` with an addition to the routing. Vanilla upcycling and training from scratch use
``TopKRouter`` itself, the MLP router ``base.OwnParametersRouter``. Symbols: n experts, D hidden size.
"""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_router_upcycling.layers.routing import record
from megatron_router_upcycling.routers.base import OwnParametersRouter, router_dtype
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import DROPPED, LOCAL, LOCALITY


class SwitchRouter(TopKRouter):
    """Switch Transformer (arXiv 2101.03961): top-1 by softmax, with Megatron's expert capacity and jitter.

    As in the original, jitter is for training only. The share of dropped tokens is in Megatron's log.
    """

    def __init__(self, *args: Any, router: RouterConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        return super().apply_input_jitter(input) if self.training else input

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled() and self.config.moe_expert_capacity_factor is not None:
            with torch.no_grad():
                # By the weights: a map padded to capacity holds tokens which did not choose the expert.
                weights = without_padding(probs, padding_mask)
                routed = len(weights) * self.topk
                dropped = routed - (weights > 0).sum()
                record(self, DROPPED, dropped / max(routed, 1))
        return probs, routing_map


class LocMoERouter(OwnParametersRouter):
    """LocMoE (arXiv 2401.13920): grouped average pooling for a gate, and a loss that keeps tokens local.

    Expert i's logit is the mean of the i-th of n equal slices of the hidden state: no parameter is learned.
    The locality loss is ``coefficient`` times the KL divergence between all mass on this rank's own experts
    and the rank's mean routing distribution P, which is -log(sum of P over them); 0 at EP 1.
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        ranks, rank = pg_collection.ep.size(), pg_collection.ep.rank()
        local = self.options.num_experts // ranks
        self.local_experts = slice(rank * local, (rank + 1) * local)
        self.expert_parallel = ranks > 1

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., n] of tokens [..., D], as by the row's constant matrix, with less arithmetic."""
        tokens = input.to(router_dtype(self.config, input))
        return tokens.unflatten(-1, (self.config.num_moe_experts, -1)).mean(dim=-1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        if not (self.expert_parallel and self.training and torch.is_grad_enabled()):
            return probs, routing_map
        with torch.no_grad():
            chosen = without_padding(routing_map, padding_mask)
            share = chosen[:, self.local_experts].sum() / chosen.sum().clamp(min=1)
            record(self, LOCAL, share)
        if coefficient := self.options.locality_loss_coeff:
            loss = locality_loss(logits, self.local_experts, padding_mask)
            # Logged and scaled as Megatron's own auxiliary losses: a sum over TP and CP, a mean over DP.
            probs = self.attach_and_log_load_balancing_loss(
                probs,
                coefficient,
                loss * coefficient / self.tp_cp_group.size(),
                LOCALITY,
                self.tp_cp_group,
                valid_token_count=len(chosen),
            )
        return probs, routing_map


def locality_loss(logits: Tensor, local_experts: slice, padding_mask: Tensor | None = None) -> Tensor:
    """-log of the mean probability mass on ``local_experts``, of logits [..., n]; a scalar.

    Tokens marked in ``padding_mask`` (of the logits' leading axes) do not count; 0 where all are marked.
    """
    logits = without_padding(logits.float().flatten(0, -2), padding_mask)
    if not len(logits):
        return logits.sum()
    # log of the mass of each token, then of their mean: no softmax that could underflow to log(0).
    mass = logits[:, local_experts].logsumexp(dim=-1) - logits.logsumexp(dim=-1)
    return math.log(len(mass)) - mass.logsumexp(dim=0)


def without_padding(rows: Tensor, padding_mask: Tensor | None) -> Tensor:
    """``rows`` [T, ...] of the tokens that ``padding_mask``, T bools of any shape, does not mark."""
    return rows if padding_mask is None else rows[~padding_mask.reshape(-1)]
