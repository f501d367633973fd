"""An export that is ready to run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.hf.architecture import Architecture
from megatron_router_upcycling.hf.rounding import Gates


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    shared_expert_width: int = 128
    modelling_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Moved:
    """Rows of a Megatron tensor: ``runs`` of them at a place of its stack."""

    key: str
    index: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Folded:
    """A layer's router, folded into gates."""

    layer: int


@dataclass(frozen=True)
class Zeros:
    """A part of the shared expert, which adds nothing."""


@dataclass(frozen=True)
class Output:
    """A tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]
    source: Moved | Folded | Zeros

    def num_bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Export:
    """Everything that is known before a byte is written."""

    checkpoint: Checkpoint
    out: Path
    model: Architecture
    router: RouterConfig | None
    gates: Gates | None
    dtype: torch.dtype
    tokenizer: Path | None
    options: Options
    keys: dict[str, str]  # Megatron's name of a row -> the name that the checkpoint has for it
    shards: list[list[Output]]
    manifest: dict[str, Any] | None

    @property
    def bytes_to_write(self) -> int:
        return sum(output.num_bytes(self.dtype) for shard in self.shards for output in shard)

    @property
    def is_stock(self) -> bool:
        """Whether stock classes hold the model."""
        gates = self.gates
        return gates is None or (gates.num_rows == self.model.num_experts and gates.hidden is None)


def class_name(job: "Export") -> str:
    """The class that loads the folder."""
    stock = str(job.model.hf_config()["architectures"][0])
    return stock if job.is_stock else f"Upcycled{stock}"
