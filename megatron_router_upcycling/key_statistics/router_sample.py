"""A sample of what routers will see: hidden states behind the norm before the FFN, in every layer.

Which tokens are taken is decided beforehand, by their places in the data; each rank takes those that it
holds. The sample is therefore the same at any tensor, pipeline, context and data parallelism.

Shapes: L layers, S tokens of the sample, D hidden size.
"""

from argparse import Namespace
from collections import defaultdict
from typing import Any

import numpy as np
import torch

SEED = 0


class RouterInput:
    """This rank's part of a sample of the tokens in ``collect_iters`` global batches.

    ``ranks`` is its place, by the names "dp", "cp" and "tp".
    """

    def __init__(self, args: Namespace, num_tokens: int, ranks: dict[str, int]) -> None:
        total = args.collect_iters * args.global_batch_size * args.seq_length
        self.num_tokens = min(num_tokens, total)
        self.hidden_size, self.dtype = args.hidden_size, args.params_dtype
        self.calls: dict[int, int] = {}  # layer -> forward passes so far
        self.taken: dict[int, torch.Tensor] = {}  # layer -> [S, D], rows of other ranks being zero
        self.places = defaultdict[int, list](list)  # forward pass -> (row, position, sample) of its tokens
        chosen = np.random.default_rng(SEED).choice(total, self.num_tokens, replace=False)
        for row, token in enumerate(sorted(chosen.tolist())):
            call, position, sample, is_own = _place(args, token, ranks)
            if is_own:
                self.places[call].append((row, position, sample))

    def take(self, layer: int, norm: Any, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A hook before an FFN: take this forward pass's rows of its input, each through ``norm``."""
        hidden = args[0]  # (sequence, batch, D)
        call = self.calls.get(layer, 0)
        self.calls[layer] = call + 1
        if layer not in self.taken:
            shape = (self.num_tokens, self.hidden_size)
            self.taken[layer] = torch.zeros(shape, dtype=self.dtype, device=hidden.device)
        if call in self.places:
            rows, positions, samples = map(list, zip(*self.places[call], strict=True))
            self.taken[layer][rows] = norm(hidden[positions, samples]).to(self.dtype)

    def gather(self, num_layers: int) -> torch.Tensor:
        """[L, S, D] on the CPU, merged over all ranks."""
        device = torch.cuda.current_device()
        merged = torch.empty((num_layers, self.num_tokens, self.hidden_size), dtype=self.dtype)
        for layer in range(num_layers):
            values = torch.zeros((self.num_tokens, self.hidden_size + 1), device=device)
            if layer in self.taken:
                values[:, :-1] = self.taken[layer]
                calls = [call for call in self.places if call < self.calls[layer]]
                values[[row for call in calls for row, _, _ in self.places[call]], -1] = 1
            torch.distributed.all_reduce(values)
            if not (values[:, -1] == 1).all():
                raise RuntimeError(
                    f"router input: of layer {layer}, {int((values[:, -1] != 1).sum())} tokens of the sample"
                    " were not seen by exactly one rank"
                )
            merged[layer] = values[:, :-1].to(self.dtype)
        return merged


def _place(args: Namespace, token: int, ranks: dict[str, int]) -> tuple[int, int, int, bool]:
    """Where ``token`` is: forward pass, position and sample in the batch of a rank, and whether of this rank.

    Data parallel ranks take a global batch's samples in turns of micro-batches, context parallel ranks two
    of 2c parts of a sequence, one from each end, and sequence parallel ranks a slice of what is left.
    """
    sample, position = divmod(token, args.seq_length)
    iteration, sample = divmod(sample, args.global_batch_size)
    micro_batch, sample = divmod(sample, args.micro_batch_size * args.data_parallel_size)
    data_rank, sample = divmod(sample, args.micro_batch_size)
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    context, context_rank, tensor_rank = args.context_parallel_size, 0, 0
    if context > 1:
        length = args.seq_length // (2 * context)
        part, position = divmod(position, length)
        context_rank = min(part, 2 * context - 1 - part)
        position += (part >= context) * length
    if args.sequence_parallel:
        slice_length = args.seq_length // context // args.tensor_model_parallel_size
        tensor_rank, position = divmod(position, slice_length)
    is_own = (data_rank, context_rank, tensor_rank) == (ranks["dp"], ranks["cp"], ranks["tp"])
    return iteration * micro_batches + micro_batch, position, sample, is_own
