"""Average key vectors of a dense model: running moments, their capture from Megatron, and their file.

Paper, section 3.2: the frozen dense model runs over a few batches and each head's key vectors are
averaged; the averages become the experts' keys. The key is taken before the rotary embedding, with its
bias and its key norm (``pre_rope``), or after the rotary embedding (``post_rope``).

``KeyMoments`` and ``KeyStats`` are pure. ``capture_keys`` is the edge to Megatron, which is imported
only there.

Shapes: L layers, G query groups (heads, without grouped-query attention), d head size, T tokens.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from megatron_router_upcycling.errors import UserError, reason

FORMAT = 1
KEY_SOURCES = ("pre_rope", "post_rope")
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


@dataclass
class KeyStats:
    """What the converter needs to know of a dense model's keys.

    ``mean`` and ``square_mean`` are float32 [L, G, d], ``count`` (tokens) is int64 [L]. ``metadata``
    holds JSON values: what the keys are, which model they come from and what made them. ``router_input``
    [L, S, D] is a sample of what routers see, for ``save``; ``load`` leaves it in the file, from which
    ``read_router_input`` takes a layer's.
    """

    mean: torch.Tensor
    square_mean: torch.Tensor
    count: torch.Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    router_input: torch.Tensor | None = None


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


# The file ---------------------------------------------------------------------------------------


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise UserError where ``save`` could not put statistics at ``path``; touches nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"--output {path}: is a folder; name a file, such as {path / 'key_stats.safetensors'}"
        )
    if path.exists() and not overwrite:
        raise UserError(f"--output {path}: exists; pass --overwrite to replace it or name another file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: cannot write in {folder}; name a file in a writable folder")


def save(path: str | Path, stats: KeyStats, overwrite: bool = False) -> None:
    """Write ``stats`` to ``path``, whole or not at all.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, or it cannot be written.
    """
    check_output(path, overwrite)
    path = Path(path)
    tensors = {
        "key_mean": stats.mean.contiguous(),
        "key_square_mean": stats.square_mean.contiguous(),
        "key_count": stats.count.contiguous(),
    }
    if stats.router_input is not None:
        tensors["router_input"] = stats.router_input.contiguous()
    content = safetensors.torch.save(
        tensors,
        metadata={name: json.dumps(value) for name, value in (stats.metadata | {"format": FORMAT}).items()},
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> KeyStats:
    """Read and check the statistics in ``path``.

    Raises:
        UserError: the file is missing, is not a whole safetensors file of this format, or its values
            cannot be statistics (shape, dtype, NaN, no tokens, numbers that its metadata contradict).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"--key-stats {path}: no such file; write one with megatron_router_upcycling.collect_keys"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names - {"router_input"}}
            sample = file.get_slice("router_input").get_shape() if "router_input" in names else None
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--key-stats {path}: cannot be read ({reason(error)}); collect the statistics again"
        ) from None
    problem = _problem(tensors, metadata)
    if sample is not None and not problem and (len(sample) != 3 or sample[0] != len(tensors["key_mean"])):
        problem = f"router_input is {sample}, where layers, tokens and hidden size are expected"
    if problem:
        raise UserError(f"--key-stats {path}: {problem}; collect the statistics again")
    return KeyStats(tensors["key_mean"], tensors["key_square_mean"], tensors["key_count"], metadata)


def read_router_input(path: str | Path, layer: int) -> torch.Tensor:
    """Hidden states that ``layer``'s router would see, [S, D] in float32, from a file that ``load`` has read.

    Raises:
        UserError: the file has none, or they are not finite.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        if "router_input" not in set(file.keys()):
            raise UserError(
                f"--key-stats {path}: holds no hidden states (router_input), which were not kept; collect the"
                " statistics again with --router-samples 512"
            )
        values = file.get_slice("router_input")[layer].float()
    if not values.isfinite().all():
        raise UserError(f"--key-stats {path}: router_input holds NaN or infinite values; collect again")
    return values


def _problem(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str | None:
    """What is wrong with a file's content, in words, or None."""
    if metadata.get("format") != FORMAT:
        return f"not key statistics of format {FORMAT}"
    for name, dtype, rank in (
        ("key_mean", torch.float32, 3),
        ("key_square_mean", torch.float32, 3),
        ("key_count", torch.int64, 1),
    ):
        tensor = tensors.get(name)
        if tensor is None:
            return f"has no tensor {name}"
        if tensor.dtype != dtype or tensor.dim() != rank:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            expected = str(dtype).removeprefix("torch.")
            return f"{name} is {kind} where {expected} of {rank} dimension{'s' * (rank > 1)} is expected"
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or infinite values"
    mean, square_mean, count = (tensors[name] for name in ("key_mean", "key_square_mean", "key_count"))
    if square_mean.shape != mean.shape or count.shape != mean.shape[:1] or mean.numel() == 0:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors))
        return f"its shapes disagree ({shapes})"
    for name, size in zip(("num_layers", "num_query_groups", "kv_channels"), mean.shape, strict=True):
        if metadata.get(name) != size:
            return f"key_mean {list(mean.shape)} contradicts its metadata's {name} {metadata.get(name)}"
    if metadata.get("key_source") not in KEY_SOURCES:
        return f"its key_source {metadata.get('key_source')!r} is not one of {', '.join(KEY_SOURCES)}"
    if (count <= 0).any():
        return "key_count holds layers without tokens"
    if (square_mean < 0).any():
        return "key_square_mean holds negative values"
    return None


# The edge to Megatron ---------------------------------------------------------------------------


@contextlib.contextmanager
def capture_keys(model: Sequence[torch.nn.Module], moments: KeyMoments, key_source: str) -> Iterator[None]:
    """While the context lasts, every forward pass of ``model`` adds its keys to ``moments``.

    Args:
        model: this rank's model chunks (several under virtual pipeline parallelism), wrapped or not.
        moments: of the whole model's size; this rank adds to its own layers and query groups.
        key_source: ``pre_rope``: the key as ``SelfAttention.get_query_key_value_tensors`` returns it,
            with its bias and its key norm. ``post_rope``: the key that core attention is called with.

    Raises:
        RuntimeError: Megatron no longer has the symbols that keys are captured at.
    """
    with contextlib.ExitStack() as stack:
        for attention in self_attentions(model):
            take = _taker(attention, moments)
            if key_source == "pre_rope":
                stack.callback(_take_before_rotary(attention, take))
            else:
                stack.callback(_take_after_rotary(attention, take))
        yield


def self_attentions(model: Sequence[torch.nn.Module]) -> list[Any]:
    """The ``SelfAttention`` modules of this rank's decoder layers, in order."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.utils import get_attr_wrapped_model

    attentions = []
    for chunk in model:
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            attention = getattr(layer, "self_attention", None)
            if not isinstance(attention, SelfAttention):
                raise UserError(
                    f"--load: layer {layer.layer_number} has {type(attention).__name__} where keys are"
                    " collected from megatron.core.transformer.attention.SelfAttention alone; use a dense"
                    " model with ordinary attention"
                )
            attentions.append(attention)
    return attentions


def _taker(attention: Any, moments: KeyMoments) -> Callable[[torch.Tensor], None]:
    """A function that adds this rank's keys [..., groups, d] of one layer to ``moments``."""
    from megatron.core.utils import get_pg_rank

    layer = attention.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
    num_groups = attention.num_query_groups_per_partition
    expected = (num_groups, attention.hidden_size_per_attention_head)
    first_group = get_pg_rank(attention.pg_collection.tp) * num_groups

    def take(key: torch.Tensor) -> None:
        if tuple(key.shape[-2:]) != expected:
            raise RuntimeError(
                f"key statistics: layer {layer} gives keys {list(key.shape)} where [..., {expected[0]},"
                f" {expected[1]}] is expected from megatron.core.transformer.attention.SelfAttention"
            )
        moments.add(layer, first_group, key)

    return take


def _take_before_rotary(attention: Any, take: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Wrap the instance's ``get_query_key_value_tensors``; return what undoes it."""
    name = "get_query_key_value_tensors"
    original = getattr(attention, name, None)
    if original is None:
        raise RuntimeError(
            f"key statistics: megatron.core.transformer.attention.SelfAttention.{name} does not exist in"
            " this version of megatron-core; tested with 0.19"
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if len(output) == 2:  # unsplit, for a fused rotary kernel: (..., groups, queries + key + value)
            mixed, sizes = output
            take(mixed.split(sizes, dim=-1)[-2])
        else:
            take(output[1])
        return output

    setattr(attention, name, call)
    return lambda: delattr(attention, name)


def _take_after_rotary(attention: Any, take: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Hook core attention, whose second argument is the key; return what undoes it."""
    core = getattr(attention, "core_attention", None)
    if not isinstance(core, torch.nn.Module):
        raise RuntimeError(
            "key statistics: megatron.core.transformer.attention.SelfAttention.core_attention is not a"
            " module in this version of megatron-core; tested with 0.19"
        )

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) < 2 and "key" not in kwargs:
            raise RuntimeError(
                "key statistics: megatron.core.transformer.attention.SelfAttention.core_attention is"
                " called without a key in this version of megatron-core; tested with 0.19"
            )
        take(kwargs["key"] if "key" in kwargs else args[1])

    return core.register_forward_pre_hook(hook, with_kwargs=True).remove
