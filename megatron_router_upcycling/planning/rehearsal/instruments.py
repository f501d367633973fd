"""Count the memory that one rank holds and the bytes that it sends in a step, on the CPU as on a GPU."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_router_upcycling.checkpoint.names import holds_experts
from megatron_router_upcycling.planning.figures import PARTS

Model = Sequence[torch.nn.Module]
# Substring of a parameter's name -> part of the model; the first match counts.
NAMES = {
    "embedding.": "embedding",
    "output_layer.": "output layer",
    "layernorm": "norms",
    "layer_norm": "norms",
    "self_attention.": "attention",
    ".router.": "routers",
}


def parameters_by_part(model: Model) -> dict[str, int]:
    """Number of parameters by ``planning.figures.PARTS``, from Megatron's names."""
    counts = dict.fromkeys(PARTS, 0)
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            of_ffn = "experts" if holds_experts([name]) else "ffn"
            part = next((part for piece, part in NAMES.items() if piece in name), of_ffn)
            counts[part] += parameter.numel()
    return counts


def held_bytes(model: Sequence[Any], optimizer: Any, copies: bool) -> dict[str, float]:
    """Bytes of weights, of DDP's gradient buffers (with padding), and of Adam's states; with ``copies``, also
    of the optimizer's float32 copies of 16-bit weights. ``model``: chunks in Megatron's DDP."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kept = part.optimizer.state.get(parameter, {}).values()
                states += parameter.nbytes if copies else 0
                states += sum(value.nbytes for value in kept if torch.is_tensor(value) and value.dim())
    return {
        "weights": sum(parameter.nbytes for chunk in model for parameter in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": states,
    }


def counting_saved(
    call: Callable[..., Any], model: Model, vocabulary: int
) -> tuple[Callable[..., Any], dict[int, int]]:
    """``call``, and what autograd saves in its first run for the backward pass: storage address -> bytes.

    Weights are not counted, nor are logits, which are the tensors with ``vocabulary`` columns.
    """
    weights = {_storage(parameter) for chunk in model for parameter in chunk.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A saved storage keeps its address. If an address is reused, the earlier storage was freed again.
        address = _storage(tensor)
        is_logits = tensor.dim() > 0 and tensor.shape[-1] == vocabulary
        if address and address not in weights and not is_logits:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kept:
            return call(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return call(*args, **kwargs)

    return counted, kept


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends in c10d's collectives (as ring algorithms) and between pipeline stages.

    ``groups``: ``group_name`` of a process group -> kind; groups not in it count as ``other``. Collectives in
    autograd's threads are counted too, because these inherit the caller's dispatch modes.
    """

    # In an operator's name -> the argument that holds the volume, and how often (n - 1) / n of it is sent.
    VOLUMES = {"allreduce": (0, 2), "reduce_scatter": (1, 1), "allgather": (0, 1), "alltoall": (1, 1)}

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups = groups
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "send":
            self.sent["pipeline_parallel"] += _bytes(args[0])
        for operator, (position, times) in self.VOLUMES.items():
            if operator in name:
                handle = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
                group = torch.distributed.ProcessGroup.unbox(handle)
                volume = _bytes(args[position]) * times * (group.size() - 1) / group.size()
                self.sent[self.groups.get(group.group_name, "other")] += int(volume)


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of a nested list of tensors."""
    return tensors.nbytes if torch.is_tensor(tensors) else sum(map(_bytes, tensors))


def parallel_groups() -> dict[str, str]:
    """``group_name`` -> kind, for Megatron's process groups of more than one rank."""
    from megatron.core import parallel_state as mpu

    kinds = {
        "data_parallel": (
            mpu.get_data_parallel_group(with_context_parallel=True),
            mpu.get_data_parallel_group(),
            mpu.get_expert_data_parallel_group(),
        ),
        "expert_parallel": (mpu.get_expert_model_parallel_group(),),
        "tensor_parallel": (mpu.get_tensor_model_parallel_group(), mpu.get_expert_tensor_parallel_group()),
        "pipeline_parallel": (mpu.get_pipeline_model_parallel_group(),),
    }
    return {group.group_name: kind for kind, groups in kinds.items() for group in groups if group.size() > 1}
