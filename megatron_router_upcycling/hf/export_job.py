"""An export that is ready to run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.hf.architecture import Architecture
from megatron_router_upcycling.routers.kinds import Sizes


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
    """A tensor of a layer's folded router (``Kind.gate``)."""

    layer: int
    name: str


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
    gate: dict[str, tuple[int, ...]] | None  # the tensors of a layer's folded router
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
        return self.router is None or self.router.kind.not_stock(self.router) is None

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.model)


def class_name(job: "Export") -> str:
    """The class that loads the folder."""
    stock = str(job.model.hf_config()["architectures"][0])
    return stock if job.is_stock else f"Upcycled{stock}"
