"""A token dispatcher for layers whose experts are all on one rank, without communication or host waits.

Even there Megatron's dispatchers sort twice, add up rows with atomic operations and copy the experts' counts
to the host. Here a token has exactly k rows: shapes are known in advance, and a CUDA graph can capture them.
"""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_router_upcycling.layers.kernels import permutation


class OneRankDispatcher(MoETokenDispatcher):
    """Megatron's six dispatcher steps, of which only the first and the last do any work."""

    def __init__(self, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.top_k = config.moe_router_topk
        self.shared_experts = None
        self.cudagraph_attrs: list[str] = []

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [s, b, D] and probabilities [T, n] as rows sorted by expert: [T * k, D] and [T * k]."""
        self.shape = tokens.shape
        self.places = permutation.find_places(routing_map, self.top_k)
        return permutation.permute(tokens.reshape(-1, tokens.shape[-1]), probs, self.places)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, how many each expert has (int32 [n], on their device), and their probabilities."""
        return hidden_states, self.places.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    token_combine = combine_preprocess

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum of each token's rows, in the original shape of the tokens."""
        combined = permutation.combine(hidden_states, self.places)
        del self.places
        return combined.view(self.shape)


def covers(config: Any, expert_ranks: int) -> bool:
    """Whether every token has k rows, all on this rank; ``config`` may be Megatron's arguments."""
    return (
        expert_ranks == 1
        and config.moe_token_dispatcher_type in ("alltoall", "allgather")
        and config.moe_expert_capacity_factor is None
        and not config.moe_router_padding_for_quantization
        and not config.moe_shared_expert_overlap
        and not config.moe_latent_size
        # A loop over experts copies their counts to the host, which a CUDA graph cannot capture.
        and (getattr(config, "cuda_graph_impl", "none") == "none" or config.moe_grouped_gemm)
    )


class UpcycledMoELayer(MoELayer):
    """Megatron's MoE layer, with ``OneRankDispatcher`` where that supports the configuration."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        groups = pg_collection or get_default_pg_collection()
        if covers(config, groups.ep.size() * groups.expt_tp.size()):
            self.token_dispatcher = OneRankDispatcher(config, groups)
