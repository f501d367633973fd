"""Softmax, top k, both auxiliary losses and the statistics of a router's logits, in a few kernels."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_router_upcycling.layers.kernels import routing
from megatron_router_upcycling.layers.kernels.routing import Loss, Routing


class FusedRoutingRouter(TopKRouter):
    """A ``TopKRouter`` whose ``routing`` is fused where the kernel supports the configuration.

    ``statistics`` are those of the last call, float32 [5 + n] as ``routing_sums`` has them; None if it was
    not fused.
    """

    statistics: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, n] and the map of the chosen experts, bool [T, n], of logits [..., n]."""
        flat = logits.reshape(-1, self.config.num_moe_experts)
        self.statistics = None
        if padding_mask is not None or not self._is_plain() or not routing.usable(flat):
            return super().routing(logits, padding_mask)
        found = routing.route(flat, self.topk, self.config.moe_router_pre_softmax)
        self.statistics = found.statistics
        probs = found.probs
        if self.training and torch.is_grad_enabled():
            probs = _Attached.apply(probs, found.sums, *self._losses(found))
        return probs, found.routing_map

    def _is_plain(self) -> bool:
        """Whether routing is softmax, top k, and at most the z-loss and the load-balancing loss."""
        config = self.config
        balancing = self.routing_type if isinstance(self.routing_type, list) else [self.routing_type]
        return (
            self.score_function == "softmax"
            and set(balancing) <= {"aux_loss", "none"}
            and not self.enable_expert_bias
            and not config.moe_router_num_groups
            and not config.moe_router_group_topk
            and not config.moe_router_topk_scaling_factor
            and config.moe_expert_capacity_factor is None
            and self.router_replay is None
            and not self.is_mtp_layer
        )

    @torch.no_grad()
    def _losses(self, found: Routing) -> tuple[Tensor, Loss, Loss]:
        """The experts' loads, and both losses, as in ``TopKRouter._apply_aux_loss`` and ``apply_z_loss``."""
        config, group = self.config, self.tp_cp_group
        size, (tokens, n), device = group.size(), found.probs.shape, found.sums.device
        scale = tokens * size if self.calculate_per_token_loss else 1
        load, balance, z = found.load, Loss(), Loss()
        if coefficient := self.get_aux_loss_coeff("aux_loss"):
            if size > 1:
                load = load.clone()
                torch.distributed.all_reduce(load, group=group)
            per_load = n / (self.topk * (tokens * size) ** 2)
            log = logged(self, "load_balancing_loss", device, reduce_group=group)
            balance = Loss(coefficient * per_load * scale, per_load, log)
        if config.moe_z_loss_coeff is not None:
            slope = config.moe_z_loss_coeff / size / tokens * scale
            z = Loss(slope, 1 / tokens, logged(self, "z_loss", device, avg_group=self.tp_dp_cp_group))
        return load, balance, z


class _Attached(torch.autograd.Function):
    """Weights; their backward pass is the losses' too, scaled as ``MoEAuxLossAutoScaler`` scales them."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, sums: Tensor, *losses: Any) -> Tensor:
        ctx.save_for_backward(routing.losses(sums, *losses))
        return probs.view_as(probs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        return grad, slopes if scale is None else slopes * scale, None, None, None


def logged(router: TopKRouter, name: str, device: torch.device, **groups: Any) -> Tensor | None:
    """This layer's element of a metric in Megatron's log, to which a micro-batch's value is added.

    ``groups`` are those over which ``MetricEntry`` sums or averages. None: the layer has no number.
    """
    if router.layer_number is None:
        return None
    config, tracker = router.config, get_moe_metrics_tracker()
    tracker.ensure_initialized(name, config.num_layers + (config.mtp_num_layers or 0), device)
    vars(entry := tracker.metrics[name]).update(groups)
    return entry.values[router.layer_number - 1 + config.num_layers * router.is_mtp_layer]


def record(router: TopKRouter, name: str, value: Tensor) -> None:
    """Put ``value`` of this layer and micro-batch among Megatron's MoE metrics, to be averaged over ranks."""
    if (element := logged(router, name, value.device, avg_group=router.tp_dp_cp_group)) is not None:
        element.add_(value.detach())


class ParameterHolder(torch.nn.Module):
    """Holds parameters that have a name prefix of their own in a checkpoint.

    A call reads one, since Megatron waits for a parameter's all-gather before a call of its module.
    """

    def forward(self, name: str) -> Tensor:
        return getattr(self, name)
