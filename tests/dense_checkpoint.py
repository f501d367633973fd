"""Small dense torch_dist checkpoints, written with PyTorch's own classes and nothing of the package."""

import io
import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCABULARY = 3, 32, 24, 8, 4, 4, 40
ATTENTION = "decoder.layers.self_attention"
MLP = "decoder.layers.mlp"


class Folder:
    """One iteration's folder in the making."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.entries: dict[str, Any] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}

    def _append(self, index: MetadataIndex, value: Any, file: str) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        with open(self.path / file, "ab") as stream:
            self.storage[index] = _StorageInfo(file, stream.tell(), len(buffer.getvalue()))
            stream.write(buffer.getvalue())

    def add(self, key: str, value: torch.Tensor, pieces: tuple[int, ...], axis: int | None = None) -> None:
        """Store ``value`` as a grid of chunks, ``pieces`` along each axis, a file for each along ``axis``."""
        sizes = [size // count for size, count in zip(value.shape, pieces, strict=True)]
        chunks = []
        for cell in torch.cartesian_prod(*(torch.arange(count) for count in pieces)).reshape(-1, len(pieces)):
            offsets = [int(i) * size for i, size in zip(cell, sizes, strict=True)]
            part = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            rank = int(cell[axis]) if axis is not None else 0
            self._append(MetadataIndex(key, offsets), part, f"__{rank}_0.distcp")
        self.entries[key] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, chunks)

    def add_object(self, key: str, value: Any) -> None:
        self._append(MetadataIndex(key), [value], "__0_0.distcp")
        self.entries[key] = BytesStorageMetadata()

    def finish(self) -> None:
        metadata = Metadata(self.entries, storage_data=self.storage, version="1.0.0")
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata))
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.path / "metadata.json").write_text(json.dumps(backend))
        tracker = self.path.parent / "latest_checkpointed_iteration.txt"
        tracker.write_text(self.path.name.removeprefix("iter_").lstrip("0"))


def arguments(**changes: Any) -> Namespace:
    """The part of Megatron's arguments that matters here."""
    values: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "group_query_attention": True, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM, "swiglu": True,
        "add_bias_linear": False, "add_qkv_bias": True, "qk_layernorm": False, "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6, "position_embedding_type": "rope", "rotary_base": 10000,
        "untie_embeddings_and_output_weights": True, "init_method_std": 0.02, "num_experts": None,
        "moe_grouped_gemm": False, "consumed_train_samples": 512, "iteration": 8,
        "params_dtype": torch.float32,
    }  # fmt: skip
    return Namespace(**(values | changes))


def tensors(
    dtype: torch.dtype = torch.float32, gated: bool = True, bias: bool = False
) -> dict[str, torch.Tensor]:
    """Random parameters of the model that ``arguments`` describes."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "output_layer.weight": (VOCABULARY, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        f"{ATTENTION}.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        f"{ATTENTION}.linear_qkv.weight": (LAYERS, (HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
        f"{ATTENTION}.linear_qkv.bias": (LAYERS, (HEADS + 2 * GROUPS) * HEAD_DIM),
        f"{ATTENTION}.linear_proj.weight": (LAYERS, HIDDEN, HEADS * HEAD_DIM),
        f"{MLP}.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        f"{MLP}.linear_fc1.weight": (LAYERS, (1 + gated) * FFN, HIDDEN),
        f"{MLP}.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
    }
    if bias:
        shapes[f"{MLP}.linear_fc1.bias"] = (LAYERS, (1 + gated) * FFN)
        shapes |= dict.fromkeys((f"{MLP}.linear_fc2.bias", f"{ATTENTION}.linear_proj.bias"), (LAYERS, HIDDEN))
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


# Models of other kinds, for ``write``.
WITH_BIAS: dict[str, Any] = {"values": tensors(bias=True), "args": arguments(add_bias_linear=True)}
NOT_GATED: dict[str, Any] = {"values": tensors(gated=False), "args": arguments(swiglu=False)}


def _pieces(key: str, value: torch.Tensor, tensor_parallel: int) -> tuple[tuple[int, ...], int | None]:
    """Chunks along each axis as Megatron divides the tensor over layers and tensor-parallel ranks."""
    layers = (LAYERS,) if key.startswith("decoder.layers.") else ()
    rows = ("linear_qkv.", "linear_fc1.", "embeddings.", "output_layer.")
    rest = [1] * (value.dim() - len(layers))
    by_column = key.endswith(("_proj.weight", "_fc2.weight"))
    axis = 0 if any(name in key for name in rows) else 1 if by_column else None
    if axis is None or "layer_norm" in key:
        return layers + tuple(rest), None
    gate_and_up = 2 if "linear_fc1." in key and value.shape[1] == 2 * FFN else 1
    rest[axis] = tensor_parallel * gate_and_up
    return layers + tuple(rest), len(layers) + axis


def write(
    root: Path,
    values: dict[str, torch.Tensor] | None = None,
    tensor_parallel: int = 1,
    optimizer: bool = False,
    args: Namespace | None = None,
    extra_states: bool = True,
    common_file: bool = False,
    **common: Any,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of iteration 8 under ``root``; return its tensors."""
    values = values or tensors()
    folder = Folder(root / "iter_0000008")
    for key, value in values.items():
        pieces, rank_axis = _pieces(key, value, tensor_parallel)
        folder.add(key, value, pieces, rank_axis)
        if optimizer:
            folder.add(f"optimizer.state.exp_avg.{key}", value.float(), pieces, rank_axis)
    if optimizer:
        folder.add_object("rng_state/shard_0.0_1.1", {"random": b"state"})
    for layer in range(LAYERS) if extra_states else ():
        for name in (f"{ATTENTION}.linear_qkv", f"{MLP}.linear_fc1", f"{MLP}.linear_fc2"):
            folder.add_object(f"{name}._extra_state/shard_{layer}_{LAYERS}", None)
    state = {
        "args": arguments() if args is None else args, "checkpoint_version": 3.0, "iteration": 8,
        "optimizer": {"common_step": torch.tensor(8.0)},
        "content_metadata": {"singleton_local_shards": False},
    }  # fmt: skip
    if common_file:
        torch.save(state | common, folder.path / "common.pt")
    else:
        folder.add_object("common_state/shard_0_1", state | common)
    folder.finish()
    return values


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an iteration's folder, read by torch.distributed.checkpoint."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_checkpoint(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        bits = [tensor.contiguous().view(torch.uint8) for tensor in (found[key], value)]
        assert found[key].dtype == value.dtype and torch.equal(*bits), key


def make_stats(path: Path, **metadata: Any) -> KeyStats:
    generator = torch.Generator().manual_seed(1)
    mean, attended = (torch.randn(LAYERS, count, HEAD_DIM, generator=generator) for count in (GROUPS, HEADS))
    described = {
        "num_layers": LAYERS, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM,
        "num_attention_heads": HEADS, "hidden_size": HIDDEN, "key_source": "pre_rope",
    }  # fmt: skip
    stats = KeyStats(mean, torch.full((LAYERS,), 100), attended, described | metadata)
    key_stats_file.save(path, stats, overwrite=True)
    return stats


def is_ffn(key: str) -> bool:
    return ".linear_fc" in key and "layer_norm" not in key
