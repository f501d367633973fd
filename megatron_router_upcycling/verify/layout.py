"""Where a Mixture-of-Experts has experts, and of which width, as its manifest says."""

from dataclasses import dataclass
from typing import Any

from megatron_router_upcycling import expert_layers
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.errors import UserError


@dataclass(frozen=True)
class Layout:
    """``layers``: those with experts, each layer under keys of its own; None: all, stacked."""

    granularity: int
    shared_expert: bool
    layers: tuple[int, ...] | None

    @classmethod
    def of(cls, recorded: dict[str, Any], router: RouterConfig, model: DenseModel, source: Any) -> "Layout":
        """Read the manifest's ``model`` section; ``source`` is named in errors.

        Raises:
            UserError: it does not fit the dense model.
        """
        layers = None
        if (text := recorded.get("moe_layer_freq")) is not None:
            frequencies = expert_layers.layer_frequency(text, f"{source}: its moe_layer_freq")
            if not isinstance(frequencies, list) or len(frequencies) != model.num_layers:
                raise UserError(f"{source}: its moe_layer_freq is no list of 0 and 1 for each layer of DENSE")
            layers = tuple(layer for layer, one in enumerate(frequencies) if one)
        if model.ffn_hidden_size % router.granularity:
            raise UserError(f"{source}: its granularity does not divide DENSE's {model.ffn_hidden_size}")
        shared_expert = recorded.get("moe_shared_expert_intermediate_size") is not None
        return cls(router.granularity, shared_expert, layers)

    def has_experts(self, layer: int | None) -> bool:
        return self.layers is None or layer in self.layers

    def arguments(self, model: DenseModel) -> dict[str, Any]:
        """Megatron's arguments that follow."""
        F, scale = model.ffn_hidden_size, self.granularity * (0.5 if self.shared_expert else 1.0)
        frequencies = [int(self.has_experts(layer)) for layer in range(model.num_layers)]
        return {
            "moe_ffn_hidden_size": F // self.granularity,
            "moe_router_topk_scaling_factor": None if scale == 1 else scale,
            "moe_shared_expert_intermediate_size": F if self.shared_expert else None,
            "moe_layer_freq": 1 if self.layers is None else frequencies,
        }

    def flags(self, model: DenseModel) -> dict[str, Any]:
        """What the manifest's ``model`` section says beside the dense model's flags."""
        flags = self.arguments(model)
        if self.granularity == 1:
            del flags["moe_ffn_hidden_size"]
        if self.layers is None:
            del flags["moe_layer_freq"]
        else:
            flags["moe_layer_freq"] = expert_layers.as_flag(flags["moe_layer_freq"])
        return {flag: value for flag, value in flags.items() if value is not None}
