"""An export that is ready to run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.hf import config_json, other_tools
from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.hf.files import CARD
from megatron_router_upcycling.hf.outputs import Output
from megatron_router_upcycling.routers.config import RouterConfig

CONVERTED = "release"  # the iteration of a checkpoint that convert made


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    shared_expert_width: int | None = None  # of one of zeros; None: 128
    modelling_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Export:
    """Everything that is known before a byte is written."""

    checkpoint: Checkpoint
    out: Path
    model: QwenModel
    router: RouterConfig | None
    gate: dict[str, tuple[int, ...]]  # the tensors of a layer's folded router
    shared_expert_width: int  # the model's own, or that of one of zeros
    dtype: torch.dtype
    beside: Path | None  # what stands beside the weights: tokenizer and more
    options: Options
    stored: dict[str, str]  # a row's tensor in name_table -> the name that the checkpoint has for it
    shards: list[list[Output]]
    manifest: dict[str, Any] | None

    @property
    def bytes_to_write(self) -> int:
        return sum(output.num_bytes(self.dtype) for shard in self.shards for output in shard)

    @property
    def left_out(self) -> list[str]:
        """What stands beside the weights and does not go along."""
        if self.beside is None:
            return []
        found = beside.look(self.beside)
        own = [f"{CARD} (the export has its own)"] if Path(CARD) in found.carried else []
        return [*own, *found.left_out]

    @property
    def is_stock(self) -> bool:
        """Whether stock classes hold the model."""
        return self.router is None or self.router.kind.not_stock(self.router) is None

    @property
    def llama_cpp_fault(self) -> str | None:
        """Why llama.cpp does not compute what the stock classes do; None where it does."""
        if self.router is None or not self.is_stock:
            return None
        return other_tools.llama_cpp_fault(self.model, self.router, self.shared_expert_width)

    @property
    def is_untrained(self) -> bool:
        """Whether the experts are as ``convert`` made them."""
        return self.manifest is not None and self.checkpoint.iteration_dir.name == CONVERTED

    @property
    def aux_losses(self) -> dict[str, float]:
        """What balanced the experts' load in training, or is to balance it in the first."""
        if self.router is None:
            return {}
        trained = other_tools.balanced_by(self.checkpoint.args)
        return other_tools.UNTRAINED if self.is_untrained else trained

    @property
    def mbridge_fault(self) -> str | None:
        """Why mbridge does not compute what the stock classes do; None where it does."""
        if self.router is None or not self.is_stock:
            return None
        return other_tools.mbridge_fault(self.model, self.router)

    @property
    def aux_loss_coefficient(self) -> float:
        """What transformers multiplies its load balancing loss by."""
        assert self.router is not None
        layers = len(self.model.expert_layers)
        return other_tools.loss_coefficient(self.aux_losses, layers, self.router.top_k)

    @property
    def class_name(self) -> str:
        """The class that loads the folder."""
        stock = config_json.class_name(self.model)
        return stock if self.is_stock else f"Upcycled{stock}"
