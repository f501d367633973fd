"""What is verified: the two checkpoints, the manifest, and what is wrong so far."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.verify.findings import Findings

FRESH_ITERATION = "release"  # the iteration of a checkpoint that convert made


@dataclass(frozen=True)
class Verification:
    """The Mixture-of-Experts, the conversion that must have made it, and what is wrong so far.

    ``plan`` is that of the dense checkpoint with the options that the manifest records; ``stats`` are the
    key statistics, None where none are needed.
    """

    moe: Checkpoint
    record: dict[str, Any]  # the manifest
    plan: Plan
    stats: KeyStats | None
    findings: Findings

    @property
    def trained(self) -> bool:
        return has_trained(self.moe)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of values, those that several chunks name being read once."""
        return sum(
            sum({chunk.blob: math.prod(chunk.sizes) for chunk in stored.chunks}.values())
            * stored.dtype.itemsize
            for stored in self.moe.tensors.values()
        )

    def section(self, name: str) -> dict[str, Any]:
        return section(self.moe, self.record, name)

    def recorded_files(self, name: str) -> dict[str, dict[str, Any]]:
        """What section ``name`` of the manifest says of each file."""
        files = self.section(name)
        for path, entry in files.items():
            if not isinstance(entry, dict) or Path(path).is_absolute() or ".." in Path(path).parts:
                raise UserError(
                    f"MOE {self.moe.root}: its manifest says {path!r} in {name!r}; convert the model again"
                )
        return files


def has_trained(moe: Checkpoint) -> bool:
    return moe.iteration_dir.name != FRESH_ITERATION


def section(moe: Checkpoint, record: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the manifest."""
    found = record.get(name)
    if not isinstance(found, dict):
        raise UserError(f"MOE {moe.root}: its manifest has no {name!r} section; convert the model again")
    return found
