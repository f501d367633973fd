"""The file of key statistics: safetensors, written whole or not at all.

Format 2 holds ``key_mean`` float32 [L, G, d], ``key_attended`` float32 [L, H, d], ``key_count`` int64 [L] and
optionally ``router_input`` [L, S, D]. Format 1, which can still be read, has no ``key_attended``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_router_upcycling.errors import UserError, error_as, os_error_as
from megatron_router_upcycling.files import blocked_by, write_whole

FORMAT = 2
KEY_SOURCE = "pre_rope"  # in the metadata: keys are taken before the rotary embedding
AGAIN = "collect the statistics again"


@dataclass
class KeyStats:
    """Statistics of a dense model's keys, for the converter."""

    mean: torch.Tensor  # float32 [L, G, d], the mean key of each query group
    count: torch.Tensor  # int64 [L], the number of tokens averaged
    attended: torch.Tensor | None = None  # float32 [L, H, d], the attended key of each head
    # JSON values: what the keys are, which model they come from and what made them.
    metadata: dict[str, Any] = field(default_factory=dict)
    # [L, S, D], a sample of router inputs, for ``save``. ``load`` sets only ``sample_shape``;
    # ``read_router_input`` reads one layer.
    router_input: torch.Tensor | None = None
    sample_shape: list[int] | None = None
    path: Path | None = None  # of the file that ``load`` has read
    pooled: tuple["KeyStats", ...] = ()  # of several texts, where these are of all

    @property
    def texts(self) -> tuple["KeyStats", ...]:
        """The statistics of each text."""
        return self.pooled or (self,)

    def samples(self, layer: int) -> list[torch.Tensor]:
        """The sampled router inputs of ``layer``, [S, D] in float32, of each file."""
        return [read_router_input(text.path, layer) for text in self.texts if text.path]


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise UserError where ``save`` could not write to ``path``; changes nothing."""
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"--output {path}: exists; pass --overwrite to replace a file, or name another one")
    if folder := blocked_by(path.absolute().parent):
        raise UserError(f"--output {path}: cannot write in {folder}; name a file in a writable folder")


def save(path: str | Path, stats: KeyStats, overwrite: bool = False) -> None:
    """Write ``stats`` to ``path``, whole or not at all."""
    check_output(path, overwrite)
    path = Path(path)
    tensors = {"key_mean": stats.mean, "key_attended": stats.attended, "key_count": stats.count}
    tensors["router_input"] = stats.router_input
    content = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        metadata={name: json.dumps(value) for name, value in (stats.metadata | {"format": FORMAT}).items()},
    )
    with os_error_as(f"--output {path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def load(path: str | Path) -> KeyStats:
    """Read and check the statistics in ``path``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--key-stats {path}: no such file; write one with collect_keys")
    kinds = (safetensors.SafetensorError, OSError, ValueError, RecursionError)
    read = error_as(kinds, f"--key-stats {path}: cannot be read", f"; {AGAIN}")
    with read, safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if name.startswith("key_")}
        sample = file.get_slice("router_input").get_shape() if "router_input" in names else None
        metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    if problem := _problem(tensors, sample, metadata):
        raise UserError(f"--key-stats {path}: {problem}; {AGAIN}")
    mean, count = tensors["key_mean"], tensors["key_count"]
    return KeyStats(mean, count, tensors.get("key_attended"), metadata, sample_shape=sample, path=path)


def pool(every: Sequence[KeyStats]) -> KeyStats:
    """The statistics of one model over several texts together: means weighted by numbers of tokens."""
    if len(every) == 1:
        return every[0]
    counts = torch.stack([stats.count for stats in every])
    share = (counts.double() / counts.sum(dim=0))[..., None, None]  # [texts, L, 1, 1]

    def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
        return (torch.stack(tensors).double() * share).sum(dim=0).float()

    known = [stats.attended for stats in every if stats.attended is not None]
    attended = mean(known) if len(known) == len(every) else None
    means = mean([stats.mean for stats in every])
    return KeyStats(means, counts.sum(dim=0), attended, every[0].metadata, pooled=tuple(every))


def read_router_input(path: str | Path, layer: int) -> torch.Tensor:
    """The sampled router inputs of ``layer``, [S, D] in float32, from a file that ``load`` has read."""
    with safetensors.safe_open(path, framework="pt") as file:
        if "router_input" not in set(file.keys()):
            missing = "holds no hidden states (router_input)"
            raise UserError(f"--key-stats {path}: {missing}; {AGAIN} with --router-samples 512")
        values = file.get_slice("router_input")[layer].float()
    if not values.isfinite().all():
        raise UserError(f"--key-stats {path}: router_input holds NaN or infinite values; {AGAIN}")
    return values


def _problem(
    tensors: dict[str, torch.Tensor], sample: list[int] | None, metadata: dict[str, Any]
) -> str | None:
    """What is wrong with a file's content, in words, or None."""
    if metadata.get("format") not in (1, FORMAT):
        return f"not key statistics of format 1 or {FORMAT}"
    sizes = ("num_layers", "num_query_groups", "num_attention_heads", "kv_channels")
    L, G, H, d = (metadata.get(name) for name in sizes)
    expected = {"key_mean": (torch.float32, [L, G, d]), "key_count": (torch.int64, [L])}
    if metadata["format"] == FORMAT or "key_attended" in tensors:
        expected["key_attended"] = (torch.float32, [L, H, d])
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.numel():
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "not there"
            return f"{name} is {found} where its metadata ask for {dtype} {shape}"
        if not tensor.isfinite().all() or (name == "key_count" and (tensor <= 0).any()):
            return f"{name} holds NaN or infinite values, or layers without tokens"
    if sample is not None and (len(sample) != 3 or sample[0] != L):
        return f"router_input is {sample}, where layers, tokens and hidden size are expected"
    if (source := metadata.get("key_source")) != KEY_SOURCE:
        return f"its key_source {source!r} is not {KEY_SOURCE}; keys after the rotary embedding are not used"
    return None
