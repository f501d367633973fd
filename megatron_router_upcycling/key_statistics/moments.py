"""Running means of a dense model's key vectors (pure torch).

Paper, section 3.2: the frozen dense model runs over a few batches and each head's key vectors are
averaged; the averages become the experts' keys.

Shapes: L layers, N vectors a token (query groups or query heads), d head size, T tokens.
"""

import numpy as np
import torch

TOKENS_PER_BLOCK = 1024


def sum_over_tokens(vectors: torch.Tensor) -> torch.Tensor:
    """Sum of [T, N, d], of any floating-point dtype, over tokens: float64 [N, d].

    Exact to float64 on the CPU; on a GPU a tree of float32 additions, so that a run's average over many
    micro-batches is good to float32's own rounding.
    """
    if vectors.is_cuda:
        return vectors.sum(0, dtype=torch.float32).double()  # casts as it reads: no copy is made
    total = torch.zeros(vectors.shape[1:], dtype=torch.float64)
    for block in vectors.split(TOKENS_PER_BLOCK):  # keeps the float64 copy small
        total += block.sum(0, dtype=torch.float64)
    return total


class TokenMean:
    """Running sums over tokens of vectors [L, N, d] of a whole model.

    Each rank holds sums of the model's full size in float64, and adds to the layers and vectors that are its
    own. Merging ranks is then one addition, whichever of heads (tensor parallel), layers (pipeline parallel)
    and tokens (data and context parallel) they divide. Tokens are counted per layer and vector, so that ranks
    which see the same tokens for different heads count them once.
    """

    def __init__(
        self, num_layers: int, num_vectors: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_layers, num_vectors, head_dim)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)  # [L, N, d]
        self.count = np.zeros(shape[:2], dtype=np.int64)  # [L, N], on the host: no kernel to launch

    @torch.no_grad()
    def add(self, layer: int, first: int, vectors: torch.Tensor) -> None:
        """Add ``vectors`` [..., n, d], which are those from ``first`` on in layer ``layer``."""
        vectors = vectors.flatten(0, -3)  # (T, n, d)
        own = slice(first, first + vectors.shape[1])
        self.total[layer, own] += sum_over_tokens(vectors)
        self.count[layer, own] += vectors.shape[0]

    def all_reduce(self) -> None:
        """Add up the sums of every rank of the run; all ranks end with the same."""
        count = torch.from_numpy(self.count).to(self.total.device)
        for tensor in (self.total, count):
            torch.distributed.all_reduce(tensor)
        self.count = count.cpu().numpy()

    @property
    def tokens(self) -> int:
        """Tokens that every vector of every layer has been averaged over.

        Raises:
            RuntimeError: some saw none or fewer than others: a rank's sums were not merged, or its layers
                were not captured.
        """
        tokens = int(self.count.max(initial=0))
        if tokens == 0 or (self.count != tokens).any():
            layer, vector = np.argwhere((self.count != tokens) | (self.count == 0))[0]
            raise RuntimeError(
                f"key statistics: layer {layer}, head or query group {vector} saw"
                f" {self.count[layer, vector]} tokens where {tokens} are expected"
            )
        return tokens

    def mean(self) -> torch.Tensor:
        """[L, N, d] in float32 on the CPU, rounded once from the float64 sums."""
        return (self.total / self.tokens).float().cpu()
