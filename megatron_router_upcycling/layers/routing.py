"""Softmax, top k and both auxiliary losses' sums of a router's logits, in one kernel each way."""

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_router_upcycling.layers.kernels import routing


class FusedRoutingRouter(TopKRouter):
    """A ``TopKRouter`` whose ``routing`` is fused where the kernel supports the configuration."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, n] and the map of the chosen experts, bool [T, n], of logits [..., n]."""
        flat = logits.reshape(-1, self.config.num_moe_experts)
        if padding_mask is not None or not self._is_plain() or not routing.usable(flat):
            return super().routing(logits, padding_mask)
        found = routing.route(flat, self.topk, self.config.moe_router_pre_softmax)
        probs = found.probs
        if self.training and torch.is_grad_enabled():
            if self.config.moe_z_loss_coeff is not None:
                probs = self._attach_z_loss(probs, found.square_sum / flat.shape[0])
            # Megatron's function sums the scores over their first axis; here they are summed already.
            scores = found.score_sums.unsqueeze(0)
            probs = self._apply_aux_loss(probs, scores, found.routing_map)
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

    def _attach_z_loss(self, probs: Tensor, mean_square: Tensor) -> Tensor:
        """As ``TopKRouter.apply_z_loss``, which computes the mean square itself."""
        size = self.tp_cp_group.size()
        coefficient = self.config.moe_z_loss_coeff / size
        z_loss = mean_square * coefficient
        record(self, "z_loss", z_loss / coefficient)
        scale = probs.shape[0] * size if self.calculate_per_token_loss else 1
        return MoEAuxLossAutoScaler.apply(probs, z_loss * scale)


def record(router: TopKRouter, name: str, value: Tensor) -> None:
    """Put ``value`` of this layer and micro-batch among Megatron's MoE metrics, to be averaged over ranks."""
    config, layer = router.config, router.layer_number
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    if layer is not None:
        layer += config.num_layers * router.is_mtp_layer
    get_moe_metrics_tracker().record(name, value, layer, num_layers, avg_group=router.tp_dp_cp_group)


class ParameterHolder(torch.nn.Module):
    """Holds parameters that have a name prefix of their own in a checkpoint.

    A call reads one, since Megatron waits for a parameter's all-gather before a call of its module.
    """

    def forward(self, name: str) -> Tensor:
        return getattr(self, name)
