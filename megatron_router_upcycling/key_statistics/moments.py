"""Running sums of a dense model's key vectors (pure torch).

Paper, section 3.2: the frozen dense model runs over a few batches and each head's key vectors are
averaged; the averages become the experts' keys. The key is taken before the rotary embedding, with its
bias and its key norm (``pre_rope``), or after the rotary embedding (``post_rope``).

Shapes: L layers, G query groups (heads, without grouped-query attention), d head size, T tokens.
"""

from typing import Any

import numpy as np
import torch

from megatron_router_upcycling.key_statistics.file import KeyStats

TOKENS_PER_BLOCK = 1024


def sums_over_tokens(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the keys and of their squares over tokens.

    Args:
        keys: [T, G, d], any floating-point dtype.

    Returns:
        Two float64 tensors [G, d]: exact to float64 on the CPU; on a GPU each is a tree of float32
        additions, so that a run's average over many micro-batches is good to float32's own rounding.
    """
    if keys.is_cuda:
        # Both reductions cast as they read: no copy of the keys is made.
        total = keys.sum(0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(keys, dim=0, dtype=torch.float32)
        return total.double(), norm.double().square()
    total = torch.zeros(keys.shape[1:], dtype=torch.float64)
    square_total = torch.zeros_like(total)
    for block in keys.split(TOKENS_PER_BLOCK):  # keeps the float64 copy small
        block = block.to(torch.float64, copy=True)
        total += block.sum(0)
        square_total += block.square_().sum(0)
    return total, square_total


class KeyMoments:
    """Running sums of keys and of their squares for a whole model.

    Each rank holds sums of the model's full size, [L, G, d] in float64, and adds to the layers and
    groups that are its own. Merging ranks is then one addition, whichever of heads (tensor parallel),
    layers (pipeline parallel) and tokens (data and context parallel) they divide. Tokens are counted
    per layer and group, so that ranks which see the same tokens for different groups count them once.
    """

    def __init__(
        self, num_layers: int, num_groups: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_layers, num_groups, head_dim)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)  # [L, G, d]
        self.square_total = torch.zeros_like(self.total)  # [L, G, d]
        self.count = np.zeros(shape[:2], dtype=np.int64)  # [L, G], on the host: no kernel to launch

    @torch.no_grad()
    def add(self, layer: int, first_group: int, keys: torch.Tensor) -> None:
        """Take up ``keys`` [..., groups, d] of groups ``first_group`` and on, in layer ``layer``."""
        keys = keys.flatten(0, -3)  # (T, groups, d)
        groups = slice(first_group, first_group + keys.shape[1])
        total, square_total = sums_over_tokens(keys)
        self.total[layer, groups] += total
        self.square_total[layer, groups] += square_total
        self.count[layer, groups] += keys.shape[0]

    def merge(self, other: "KeyMoments") -> None:
        """Take up what another rank or run has seen."""
        self.total += other.total
        self.square_total += other.square_total
        self.count += other.count

    def all_reduce(self) -> None:
        """``merge`` over every rank of the run; all ranks end with the same sums."""
        count = torch.from_numpy(self.count).to(self.total.device)
        for tensor in (self.total, self.square_total, count):
            torch.distributed.all_reduce(tensor)
        self.count = count.cpu().numpy()

    def stats(self, metadata: dict[str, Any]) -> KeyStats:
        """Means in float32, rounded once from the float64 sums.

        Raises:
            RuntimeError: some layer or group has not seen every token (a rank's sums were not merged,
                or its layers were not captured).
        """
        tokens = self.count.max(initial=0)
        if tokens == 0 or (self.count != tokens).any():
            layer, group = np.argwhere((self.count != tokens) | (self.count == 0))[0]
            raise RuntimeError(
                f"key statistics: layer {layer}, query group {group} saw {self.count[layer, group]} tokens"
                f" where {tokens} are expected"
            )
        return KeyStats(
            mean=(self.total / tokens).float().cpu(),
            square_mean=(self.square_total / tokens).float().cpu(),
            count=torch.from_numpy(self.count[:, 0].copy()),
            metadata=metadata,
        )
