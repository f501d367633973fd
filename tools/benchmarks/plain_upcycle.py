"""Upcycle in the straightforward way, as a baseline: the whole model in memory, every expert a copy.

    .venv/bin/python tools/benchmarks/plain_upcycle.py DENSE OUT 8

Reads a dense torch_dist checkpoint (an iteration's folder) with PyTorch's own loader, repeats each FFN
tensor, and writes with PyTorch's own writer. The routers are random. The result has the tensors of a Megatron
checkpoint but no common state: it serves to measure time and memory, not for training.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint import save as save_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FFN = ("decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight")


def upcycle(dense: Path, out: Path, num_experts: int) -> None:
    reader = FileSystemReader(dense)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_checkpoint(state, storage_reader=reader, no_dist=True)
    for key in FFN:
        weight = state.pop(key)  # [L, rows, columns]
        name = key.replace(".mlp.", ".mlp.experts.experts.")
        state[name] = weight.unsqueeze(1).repeat(1, num_experts, 1, 1)
    layers, hidden_size = state["decoder.layers.mlp.linear_fc1.layer_norm_weight"].shape
    router = torch.empty(layers, num_experts, hidden_size, dtype=weight.dtype)
    state["decoder.layers.mlp.router.weight"] = router.normal_(std=0.02)
    save_checkpoint(state, storage_writer=FileSystemWriter(out), no_dist=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    upcycle(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
