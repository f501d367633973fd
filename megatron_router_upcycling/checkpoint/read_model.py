"""Read a dense model from its checkpoint: its training arguments, checked against its tensors."""

import hashlib
import math
import re
import zlib
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import described, names
from megatron_router_upcycling.checkpoint.dense_model import UNKNOWN_LAYERS, DenseModel
from megatron_router_upcycling.checkpoint.format.metadata import Chunk
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason, shown
from megatron_router_upcycling.expert_layers import MOST_LAYERS


def read_model(checkpoint: Checkpoint) -> DenseModel:
    """The dense model in ``checkpoint``; UserError where its tensors contradict its arguments."""
    root, tensors = checkpoint.root, checkpoint.tensors
    _refuse_unknown(checkpoint)
    if names.QKV not in tensors:
        raise UserError(f"{root}: has no tensor {names.QKV}; convert takes a dense GPT model")
    model = model_of(checkpoint, tensors[names.QKV].dtype)
    vocabulary = getattr(checkpoint.args, "vocab_size", None)
    rows = [vocabulary] if isinstance(vocabulary, int) else [0]  # a padded embedding stores more
    if names.EMBEDDING in tensors:
        rows += tensors[names.EMBEDDING].shape[:1]
    expected = model.parameters(max(rows))
    for either, shape in expected.items():
        stored: dict[str, Any] = {name: list(tensors[name].shape) for name in either if name in tensors}
        for name, found in (stored or {either[0]: "missing"}).items():
            if found != list(shape):
                asked = f"where {checkpoint.described_by} ask for {list(shape)}"
                raise UserError(f"{root}: {name} is {found}, {asked}; convert takes a dense GPT model")
    known = {names.POSITIONS, *(name for either in expected for name in either)}
    for name in tensors:
        if names.MODEL_STATE.match(name) and name not in known:
            flag = next((flag for part, flag in names.ADDED_BY.items() if re.search(part, name)), "no flag")
            raise UserError(f"{root}: holds {name}, which {flag} adds, and {checkpoint.described_by} lack it")
    return model


def model_of(checkpoint: Checkpoint, dtype: torch.dtype) -> DenseModel:
    """The model that the arguments of ``checkpoint`` describe; UserError where they describe none."""
    try:
        model = DenseModel.from_arguments(checkpoint.args, dtype=dtype)
        _check_numbers(model)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        why = f"has no {error.name}" if isinstance(error, AttributeError) else reason(error)
        source = checkpoint.described_by
        raise UserError(f"{source}: do not give the architecture ({why}); {described.WAY_OUT}") from None
    return model


def query_key_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the offsets and CRC-32s of the QKV weights, which any training step changes and
    ``Checkpoint.digest`` does not cover. Where ``torch.save`` wrote a checksum, no value is read."""
    stored, digest = checkpoint.tensors[names.QKV], hashlib.sha256()
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets):
        crc = checksum(checkpoint, chunk, stored.dtype)
        digest.update(f"{chunk.offsets} {chunk.sizes} {crc}\n".encode())
    return digest.hexdigest()


def checksum(checkpoint: Checkpoint, chunk: Chunk, dtype: torch.dtype) -> int:
    """The CRC-32 of a chunk's values."""
    if values := checkpoint.find_values(chunk, dtype):
        return values.checksum
    tensor = checkpoint.read_chunk(chunk, dtype, bytearray()).contiguous()
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy())


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    root = checkpoint.root
    args = None if names.holds_experts(checkpoint.tensors) else checkpoint.args
    if args is None or getattr(args, "num_experts", None):
        raise UserError(f"DENSE {root}: a Mixture-of-Experts already; name a dense model's checkpoint")
    for name in UNKNOWN_LAYERS:
        if value := getattr(args, name, None):
            raise UserError(
                f"DENSE {root}: trained with --{name.replace('_', '-')} {shown(value)}, which convert does"
                " not support; it takes GPT models with ordinary attention"
            )


def count_experts(checkpoint: Checkpoint) -> int | None:
    """The number of experts in a layer, from the rows of the stored router's weight; None without one."""
    for key, tensor in checkpoint.tensors.items():
        if names.split_key(key)[0] == f"{names.ROUTER}.weight" and len(tensor.shape) > 1:
            return tensor.shape[-2]
    return None


def _check_numbers(model: DenseModel) -> None:
    """Raise ValueError for sizes, head counts or an ``init_method_std`` that no model can have."""
    for name in (*described.SIZES, "ffn_hidden_size", "num_query_groups", "kv_channels"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} is {getattr(model, name)}")
    if model.num_layers > MOST_LAYERS:
        raise ValueError(f"{model.num_layers} layers; convert takes up to {MOST_LAYERS}")
    if not 0 <= model.init_method_std < math.inf:
        raise ValueError(f"init_method_std is {model.init_method_std}")
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        raise ValueError(f"{groups} query groups do not divide {heads} attention heads")
