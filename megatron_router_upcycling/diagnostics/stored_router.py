"""Read one layer's router from a checkpoint as plain tensors. Symbols: n experts, top k, hidden size D."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import all_parameters

BIAS = "bias"


@dataclass(frozen=True)
class Router:
    """A layer's router: its options, its float32 parameters by name, and the hidden size D.

    A mixture has ``query_weight`` [m, d', D] and ``expert_key`` [n*c, d'].
    """

    config: RouterConfig
    parameters: dict[str, Tensor]
    hidden_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """The experts' scores (eq. 6 to 8), [..., n], for hidden states after the FFN's norm, [..., D]."""
        gate = self.config.kind.gate(self.parameters, self.config, self.hidden_size, torch.float32)
        logits = self.config.kind.logits(gate, hidden.float(), self.config)
        return logits + self.parameters[BIAS] if BIAS in self.parameters else logits

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens [..., D] (eq. 9) without a capacity limit: experts' weights and indices, [..., k]."""
        logits = self.logits(hidden)
        top = logits.topk(self.config.top_k, dim=-1)
        if self.config.pre_softmax:
            return logits.softmax(dim=-1).gather(-1, top.indices), top.indices
        return top.values.softmax(dim=-1), top.indices


def load_router(checkpoint: str | Path, layer: int = 0) -> Router:
    """Read the router of ``layer`` (from 0) from an upcycled checkpoint's root folder, trained or not.

    Example:
        >>> router = load_router("ckpt/moe", layer=3)
        >>> weights, experts = router.route(hidden)  # [T, D] -> [T, k], [T, k]
    """
    opened = open_checkpoint(checkpoint)
    record = manifest.read(opened.root)
    if record is None:
        raise UserError(f"{opened.root}: has no {manifest.NAME}; name a checkpoint that convert made")
    config = manifest.router_config(record, opened.root / manifest.NAME)
    num_layers = getattr(opened.args, "num_layers", 0)
    if not 0 <= layer < num_layers:
        raise UserError(f"layer {layer}: {opened.root} has layers 0 to {num_layers - 1}")
    return read_router(opened, config, layer)


def read_router(checkpoint: Checkpoint, config: RouterConfig, layer: int) -> Router:
    """The router of one layer of an open checkpoint."""
    args = checkpoint.args
    parameters = {
        parameter.name: read_layer(checkpoint, f"{names.ROUTER}.{parameter.name}", layer)
        for parameter in all_parameters(config, args, getattr(args, "add_bias_linear", False))
    }
    return Router(config, parameters, args.hidden_size)


def read_layer(checkpoint: Checkpoint, name: str, layer: int) -> Tensor:
    """One layer of parameter ``name`` in float32, whether it is stored stacked over layers or by layer."""
    own = names.at_layer(name, layer)
    if name in checkpoint.tensors:
        return checkpoint.read_layer(name, layer, bytearray()).float()
    if own in checkpoint.tensors:
        return checkpoint.read_box(own).float()
    raise UserError(f"{checkpoint.root}: has no {name}, which its {manifest.NAME} promises")


def router_layers(checkpoint: Checkpoint) -> list[int]:
    """The layers that have experts, counted from 0; found by experts, as a router may have no parameters."""
    split = ((*names.split_key(key), tensor) for key, tensor in checkpoint.tensors.items())
    found = {(layer, tensor.shape[0]) for key, layer, tensor in split if key.startswith(f"{names.EXPERTS}.")}
    own = sorted({layer for layer, _ in found if layer is not None})
    return own or list(range(min((count for _, count in found), default=0)))
