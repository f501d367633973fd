"""All experts of a layer in two grouped products, where Transformer Engine's grouped GEMM is not in use.

Megatron's ``SequentialMLP`` multiplies expert by expert. ``GroupedExperts`` has the same parameters under the
same names, so that checkpoints do not differ, and hands all experts to ``torch.nn.functional.grouped_mm`` at
once. Asked for by ``--moe-grouped-gemm``; taken only where ``usable`` has seen PyTorch's kernel give right
values and gradients on this device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn.functional import silu

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

HOPPER = (9, 0)  # compute capability from which PyTorch has grouped kernels for bfloat16


def grouped_product(tokens: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Rows of ``tokens`` [T, in], sorted by expert, times their expert's ``weights`` [n, out, in]: [T, out].

    Args:
        counts: int [n] on the device of ``tokens``, how many rows each expert has; they sum to T.
    """
    ends = counts.cumsum(0).to(torch.int32)
    return torch.nn.functional.grouped_mm(tokens, weights.transpose(1, 2), offs=ends)


class GroupedExperts(SequentialMLP):
    """``SequentialMLP`` of gated SiLU experts without biases, in grouped products.

    What it does not cover (biases, other activations, fp8, tensor-parallel experts, probabilities on the
    input, recomputed activations, and on a GPU all but bfloat16) is left to Megatron's loop.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.grouped = (
            config.gated_linear_unit
            and config.activation_func is silu
            and not config.add_bias_linear
            and not (config.fp8 or config.fp4)
            and not config.moe_apply_probs_on_input
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
            and "moe_act" not in (config.recompute_modules or ())
            and self.tp_group.size() == 1
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Tokens [T, D], sorted by expert, through their experts and weighted: [T, D]."""
        tokens = permuted_local_hidden_states
        untried = tokens.is_cuda and tokens.dtype is not torch.bfloat16  # usable() tries that dtype
        if not self.grouped or untried or tokens.shape[0] == 0:
            return super().forward(tokens, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.to(tokens.device)
        fc1 = torch.stack([expert.linear_fc1.weight for expert in self.local_experts])
        fc2 = torch.stack([expert.linear_fc2.weight for expert in self.local_experts])
        hidden = grouped_product(tokens, fc1, counts)
        probs = permuted_probs.unsqueeze(-1)
        if self.config.bias_activation_fusion:
            hidden = weighted_bias_swiglu_impl(hidden, None, probs, False)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = (silu(gate) * up * probs).to(hidden.dtype)
        return grouped_product(hidden, fc2, counts), None


@functools.cache
def usable(device: str) -> str | None:
    """Why grouped products are not to be used on ``device`` ('cpu' or 'cuda'); None where they are right.

    A small product and its gradients are computed and compared with a loop, once a process.
    """
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no grouped_mm"
    if device == "cuda" and torch.cuda.get_device_capability() < HOPPER:
        return "the GPU is older than Hopper"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    tokens, weights, grad = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((96, 64), (4, 32, 64), (96, 32))
    )
    counts = [40, 0, 8, 48]
    try:
        results = []
        products: tuple[Product, ...] = (grouped_product, _loop)
        for product in products:
            x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
            output = product(x, w, torch.tensor(counts, device=device))
            output.backward(grad)
            results.append([output.detach(), x.grad, w.grad])
    except (RuntimeError, NotImplementedError) as error:
        return f"grouped_mm fails here: {str(error).splitlines()[0]}"
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for found, expected in zip(*results, strict=True):
        if not torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance * 8):
            return "grouped_mm differs from a loop over the experts"
    return None


def _loop(tokens: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    parts = tokens.split(counts.tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])
