"""Fine-grained upcycling: smaller experts cut from each copy of the dense FFN, and a shared expert.

n copies of an FFN of width F, each cut G ways along F, are n*G experts of width F/G. Expert i*G + g is
shard g of copy i: rows of FC1 (of its gate and of its up projection), columns of FC2. The F channels of an
FFN are independent, with SwiGLU too, so that the shards' outputs add up to the FFN's.

At step 0 the shards of a copy have equal router logits and are chosen together, k*G of n*G in all. The
softmax, whether over all experts or the chosen ones, divides a copy's weight among its G shards;
``moe_router_topk_scaling_factor`` G compensates for that. The experts' values remain those of the dense FFN,
in any dtype, and all n copies share a shard's bytes. (Megatron's upcycling scales the weights instead:
arXiv 2410.07524, section 4.) If copies have logits that are equal to the last bit, as for a zero hidden
state, only some of a copy's shards may be chosen.

A shared expert is the whole dense FFN, applied to every token. It gives one half of the output and the
chosen experts the other: its FC2 is halved, which is exact, and the scaling factor is halved.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_router_upcycling.checkpoint.dense_model import Architecture, DenseModel
from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.format.metadata import StoredTensor
from megatron_router_upcycling.checkpoint.names import FC1, FC2
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError

SHARE = 0.5  # the shared expert's part of the output; a power of two, so that scaling by it is exact


@dataclass(frozen=True)
class Cut:
    """How a parameter of the FFN is cut: ``parts`` blocks of F along ``axis``, each ``granularity`` ways."""

    axis: int  # of the dense parameter
    parts: int  # 2 for a gated FC1: gate, up
    granularity: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a shard, from the dense parameter's."""
        return (*shape[: self.axis], shape[self.axis] // self.granularity, *shape[self.axis + 1 :])

    def _pieces(self, size: int) -> Iterator[tuple[int, int, int, int]]:
        """The pieces of ``size`` = parts x F: shard, offset in the dense parameter, in the shard, width."""
        block = size // self.parts
        width = block // self.granularity
        for part in range(self.parts):
            for shard in range(self.granularity):
                yield shard, part * block + shard * width, part * width, width

    def sources(self, box: Box, shard: int, shape: tuple[int, ...]) -> Iterator[tuple[Box, Box]]:
        """The parts of a shard's ``box``, each with its box in the dense parameter of shape ``shape``."""
        for number, dense, place, width in self._pieces(shape[self.axis]):
            low = max(box.offsets[self.axis], place)
            size = min(box.ends[self.axis], place + width) - low
            if number == shard and size > 0:
                whole = box.along(self.axis, dense + low - place, size)
                yield box.along(self.axis, low, size), whole

    def shards(
        self, tensor: torch.Tensor, offsets: tuple[int, ...], stored: StoredTensor
    ) -> Iterator[tuple[int, torch.Tensor, tuple[int, ...]]]:
        """Cut a chunk, ``tensor`` at ``offsets``, into shards: shard, values, offsets in the shard."""
        axis = self.axis
        begin, end = offsets[axis], offsets[axis] + tensor.shape[axis]
        for shard, dense, place, width in self._pieces(stored.shape[axis]):
            low, high = max(dense, begin), min(dense + width, end)
            if low < high:
                at = (*offsets[:axis], place + low - dense, *offsets[axis + 1 :])
                yield shard, tensor.narrow(axis, low - begin, high - low), at


def check(dense: Checkpoint, model: DenseModel, granularity: int, shared_expert: bool) -> None:
    check_width(model, granularity)
    flag = "--granularity" if granularity > 1 else "--shared-expert" if shared_expert else None
    if flag and any(f"{linear}.bias" in dense.tensors for linear in (FC1, FC2)):
        raise UserError(f"{flag}: {dense.root} has biases in its FFN, which cannot be divided; leave it out")


def check_width(model: Architecture, granularity: int) -> None:
    if (width := model.ffn_hidden_size) % granularity:
        raise UserError(
            f"--granularity {granularity}: does not divide the FFN's width {width}; give a divisor"
        )
