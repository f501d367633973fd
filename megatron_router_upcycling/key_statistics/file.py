"""The file of key statistics: safetensors, written whole or not at all.

Format 2 holds ``key_mean`` float32 [L, G, d], ``key_attended`` float32 [L, H, d], ``key_count`` int64 [L] and
perhaps ``router_input`` [L, S, D]. Format 1, which is read as well, had no ``key_attended``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.files import blocked_by, write_whole

FORMAT = 2
# Tensor -> its dtype and number of dimensions. Format 1 had a key_square_mean too, which nothing read.
TENSORS = {"key_mean": (torch.float32, 3), "key_count": (torch.int64, 1), "key_attended": (torch.float32, 3)}
KEY_SOURCES = ("pre_rope", "post_rope")


@dataclass
class KeyStats:
    """What the converter needs to know of a dense model's keys.

    - ``mean``: float32 [L, G, d], the mean key of each query group.
    - ``count``: int64 [L], the tokens that ``mean`` is over.
    - ``attended``: float32 [L, H, d], the attended key of each query head (``capture``); None in a file of
      format 1.
    - ``metadata``: JSON values: what the keys are, which model they come from and what made them.
    - ``router_input``: [L, S, D], a sample of what routers see, for ``save``; ``load`` leaves it in the file,
      from which ``read_router_input`` takes a layer's.
    - ``path``: of the file that ``load`` has read.
    """

    mean: torch.Tensor
    count: torch.Tensor
    attended: torch.Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    router_input: torch.Tensor | None = None
    path: Path | None = None


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise UserError where ``save`` could not put statistics at ``path``; touches nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"--output {path}: is a folder; name a file, such as {path / 'key_stats.safetensors'}"
        )
    if path.exists() and not overwrite:
        raise UserError(f"--output {path}: exists; pass --overwrite to replace it or name another file")
    if folder := blocked_by(path.absolute().parent):
        raise UserError(f"--output {path}: cannot write in {folder}; name a file in a writable folder")


def save(path: str | Path, stats: KeyStats, overwrite: bool = False) -> None:
    """Write ``stats`` to ``path``, whole or not at all.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, or it cannot be written.
    """
    check_output(path, overwrite)
    path = Path(path)
    assert stats.attended is not None
    tensors = {"key_mean": stats.mean, "key_attended": stats.attended, "key_count": stats.count}
    if stats.router_input is not None:
        tensors["router_input"] = stats.router_input
    content = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={name: json.dumps(value) for name, value in (stats.metadata | {"format": FORMAT}).items()},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None


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
            tensors = {name: file.get_tensor(name) for name in names & TENSORS.keys()}
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
    return KeyStats(
        tensors["key_mean"], tensors["key_count"], tensors.get("key_attended"), metadata, path=path
    )


def read_router_input(path: str | Path, layer: int) -> torch.Tensor:
    """What ``layer``'s router would see, [S, D] in float32, from a file that ``load`` has read."""
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
    if metadata.get("format") not in (1, FORMAT):
        return f"not key statistics of format 1 or {FORMAT}"
    for name, (dtype, rank) in TENSORS.items():
        tensor = tensors.get(name)
        if tensor is None:
            if metadata["format"] == 1 and name == "key_attended":
                continue
            return f"has no tensor {name}"
        if tensor.dtype != dtype or tensor.dim() != rank:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            expected = str(dtype).removeprefix("torch.")
            return f"{name} is {kind} where {expected} of {rank} dimension{'s' * (rank > 1)} is expected"
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or infinite values"
    mean, count, attended = tensors["key_mean"], tensors["key_count"], tensors.get("key_attended")
    heads = None if attended is None else (len(mean), metadata.get("num_attention_heads"), mean.shape[2])
    fits = attended is None or tuple(attended.shape) == heads
    if count.shape != mean.shape[:1] or mean.numel() == 0 or not fits:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors))
        return f"its shapes disagree ({shapes})"
    for name, size in zip(("num_layers", "num_query_groups", "kv_channels"), mean.shape, strict=True):
        if metadata.get(name) != size:
            return f"key_mean {list(mean.shape)} contradicts its metadata's {name} {metadata.get(name)}"
    if metadata.get("key_source") not in KEY_SOURCES:
        return f"its key_source {metadata.get('key_source')!r} is not one of {', '.join(KEY_SOURCES)}"
    if (count <= 0).any():
        return "key_count holds layers without tokens"
    return None
