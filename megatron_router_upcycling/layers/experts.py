"""A layer's experts as two stacked parameters, applied to all tokens in two grouped matrix products.

In a checkpoint they have the same tensors and names as Megatron's ``SequentialMLP``, which multiplies expert
by expert, and as Transformer Engine's grouped experts.

Symbols: R rows (a token's copy for one expert), n local experts, D hidden size, F the experts' FFN width.
"""

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.nn.functional import silu

from megatron_router_upcycling.checkpoint.names import EXTRA_STATE
from megatron_router_upcycling.layers import STACK
from megatron_router_upcycling.layers.kernels.swiglu import weighted_swiglu

HOPPER = (9, 0)  # compute capability from which PyTorch has grouped kernels for bfloat16
LINEARS = ("linear_fc1", "linear_fc2")


def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """``rows`` [R, in], sorted by expert, times their expert's ``weights`` [n, out, in]: [R, out].

    ``counts``, int [n] on the same device, says how many rows each expert has.
    """
    ends = counts.cumsum(0, dtype=torch.int32)
    return torch.nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def covers(config: TransformerConfig, expert_tensor_size: int) -> bool:
    """Whether ``GroupedExperts`` can be the experts of a model."""
    return (
        config.gated_linear_unit
        and config.activation_func is silu
        and not config.add_bias_linear
        and not (config.fp8 or config.fp4)
        and not config.moe_apply_probs_on_input
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and "moe_act" not in (config.recompute_modules or ())
        and expert_tensor_size == 1
        and (config.params_dtype is torch.bfloat16 or not torch.cuda.is_available())
    )


class GroupedExperts(MegatronModule):
    """``linear_fc1_weight`` [n, 2F, D], gate first, and ``linear_fc2_weight`` [n, D, F]."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        loop = SequentialMLP(num_local_experts, config, submodules, pg_collection, name)
        super().__init__(config=loop.config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = loop.ep_group, loop.dp_group
        for linear in LINEARS:
            weights = [getattr(expert, linear).weight for expert in loop.local_experts]
            stacked = torch.nn.Parameter(torch.stack([weight.data for weight in weights]))
            for attribute, value in vars(weights[0]).items():
                setattr(stacked, attribute, value)  # Megatron's marks of an expert's parameter
            setattr(stacked, STACK, True)
            self.register_parameter(f"{linear}_weight", stacked)
            for expert in loop.local_experts:
                getattr(expert, linear).weight = None

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """The experts' outputs for rows [R, D], sorted by expert, weighted by ``permuted_probs``: [R, D]."""
        rows = permuted_local_hidden_states
        if rows.shape[0] == 0:  # grouped_mm takes no empty input, but the parameters need gradients
            hidden = weighted_swiglu(rows @ self.linear_fc1_weight[0].t(), permuted_probs)
            return hidden @ self.linear_fc2_weight[0].t(), None
        counts = tokens_per_expert.to(rows.device, non_blocking=True)
        hidden = grouped_product(rows, self.linear_fc1_weight, counts)
        hidden = weighted_swiglu(hidden, permuted_probs)
        return grouped_product(hidden, self.linear_fc2_weight, counts), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed: there is nothing to compute."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The entries of ``SequentialMLP``, from a factory for each stacked parameter."""
        singleton = (metadata or {}).get("singleton_local_shards", False)
        replica = (0, 0, self.dp_group.rank())
        first = self.ep_group.rank() * self.num_local_experts
        total = self.num_local_experts * self.ep_group.size()
        places = {
            expert: () if singleton else ((len(sharded_offsets), expert, total),)
            for expert in range(first, first + self.num_local_experts)
        }
        entries: dict[str, Any] = {}
        for linear in LINEARS:
            stacked = self.get_parameter(f"{linear}_weight")
            halves = 2 if linear == "linear_fc1" else 1
            entries[f"{prefix}{linear}_weight"] = ShardedTensorFactory(
                f"{prefix}experts.{linear}.weight",
                stacked,
                functools.partial(_shards, places, sharded_offsets, singleton, halves),
                functools.partial(_stack, halves),
                replica,
            )
            for local, (expert, place) in enumerate(places.items()):
                own = f"{prefix}experts.{expert}." if singleton else f"{prefix}experts."
                entries[f"{prefix}{local}.{linear}{EXTRA_STATE}"] = make_sharded_object_for_checkpoint(
                    None, f"{own}{linear}{EXTRA_STATE}", (*sharded_offsets, *place), replica_id=replica
                )
        return entries

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Ignore extra states, which only Transformer Engine's experts have."""
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(EXTRA_STATE)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _shards(
    places: dict[int, tuple],
    offsets: tuple,
    singleton: bool,
    halves: int,
    key: str,
    stacked: Tensor,
    replica_id: Any,
    flattened: Any = None,
) -> list[ShardedTensor]:
    """A stacked parameter [n, out, in] as Megatron's shards: one an expert, or gate and up (2 ``halves``).

    ``places``: local expert's number -> its offset among all experts, or () if ``singleton``: each then has
    its own key. ``ShardedTensorFactory`` passes ``key`` and the arguments after it.
    """
    found = []
    for weight, (expert, place) in zip(stacked, places.items(), strict=True):
        own = key.replace(".experts.linear", f".experts.{expert}.linear") if singleton else key
        axes = (*offsets, *place)
        for half, part in enumerate(weight.chunk(halves)):
            name = own + ("_w", "_v")[half] if singleton and halves > 1 else own
            cut = ((len(axes), half, halves),) if halves > 1 and not singleton else ()
            found.append(
                ShardedTensor.from_rank_offsets(
                    name, part, *axes, *cut, replica_id=replica_id, prepend_axis_num=len(axes)
                )
            )
    return found


def _stack(halves: int, parts: list[Tensor]) -> Tensor:
    """The inverse of ``_shards``."""
    return torch.stack([torch.cat(parts[i : i + halves]) for i in range(0, len(parts), halves)])


@functools.cache
def usable(device: str) -> str | None:
    """Why grouped products cannot be used on ``device`` ('cpu' or 'cuda'); None where they are correct."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no grouped_mm"
    if device == "cuda" and torch.cuda.get_device_capability() < HOPPER:
        return "the GPU is older than Hopper"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    tokens, weights, grad = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((96, 64), (4, 32, 64), (96, 32))
    )
    counts = torch.tensor([40, 0, 8, 48], device=device)
    try:
        results = []
        for product in (grouped_product, _loop):
            output = product(tokens, weights, counts)
            found = output, *torch.autograd.grad(output, (tokens, weights), grad)
            results.append([value.float() for value in found])
    except (RuntimeError, NotImplementedError) as error:
        return f"grouped_mm fails here: {str(error).splitlines()[0]}"
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    same = (torch.allclose(*pair, rtol=tolerance, atol=tolerance * 8) for pair in zip(*results, strict=True))
    return None if all(same) else "grouped_mm differs from a loop over the experts"


def _loop(tokens: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    parts = tokens.split(counts.tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])
