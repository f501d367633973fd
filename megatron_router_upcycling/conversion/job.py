"""A conversion that is ready to run."""

from dataclasses import dataclass
from pathlib import Path

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.publish.source_guard import Stamps
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.files import on_one_disk
from megatron_router_upcycling.key_statistics.file import KeyStats


@dataclass(frozen=True)
class Conversion:
    """Everything that is known before a byte is written."""

    dense: Checkpoint
    model: DenseModel
    options: Options
    stats: KeyStats | None
    plan: Plan
    out: Path
    sources: Stamps

    @property
    def bytes_to_write(self) -> int:
        """What the disk must have room for, but for the few bytes around each chunk."""
        plan = self.plan
        return plan.expert_bytes + plan.router_bytes + (plan.changed_bytes if self.links else plan.kept_bytes)

    @property
    def memory_bytes(self) -> int:
        """What the model itself takes of memory at most, whatever its number of layers.

        A chunk that is read; for a mixture, one layer's queries, keys and values twice (joined from chunks,
        then apart), its router, and that of the layer before.
        """
        model, plan = self.model, self.plan
        if not self.options.router.kind.of_heads:
            return plan.scratch_bytes
        heads = model.num_attention_heads + 2 * model.num_query_groups
        rows = heads * model.kv_channels * model.hidden_size * model.dtype.itemsize
        layers = model.num_layers if plan.layers is None else len(plan.layers)
        return plan.scratch_bytes + 2 * rows + 2 * plan.router_bytes // layers

    @property
    def links(self) -> bool:
        """Whether what does not change is linked rather than copied."""
        linkable = self.plan.kept_bytes > self.plan.changed_bytes
        return linkable and not self.options.materialize and on_one_disk(self.dense.iteration_dir, self.out)
