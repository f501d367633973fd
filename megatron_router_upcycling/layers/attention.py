"""Attention through PyTorch's ``scaled_dot_product_attention``, where Transformer Engine is not in use.

Megatron's own ``DotProductAttention`` writes the whole [batch * heads, queries, keys] matrix of scores to
memory, several times over; PyTorch's kernel never does, and needs no copies of keys that heads share.
"""

import contextlib
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaAttention(DotProductAttention):
    """A ``DotProductAttention`` without a materialised score matrix, equal to Megatron's up to rounding.

    Sliding windows, softmax offsets, query-key layer scaling and decoding with a cache take Megatron's path.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of query [s, b, heads, d] over key and value [s, b, groups, d]: [s, b, heads * d].

        ``attention_mask`` is bool [b or 1, 1, s, s], True where a key must not be seen (Megatron's sense);
        None: causal, or everything, by the module's ``attn_mask_type``, never by the argument.
        """
        if (
            packed_seq_params is not None
            or attention_bias is not None
            or query.shape[0] != key.shape[0]
            or self.scale_mask_softmax.window_size is not None
            or self.config.softmax_type != "vanilla"
            or self.config.apply_query_key_layer_scaling
        ):
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        dropout = self.attention_dropout.p if self.training else 0.0
        # Each tensor-parallel rank drops entries of its own heads, as Megatron's module does.
        fork = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            context = scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),  # [b, heads, s, d]
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None and self.attn_mask_type == AttnMaskType.causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], self.hidden_size_per_partition)
