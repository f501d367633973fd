"""A dense model read from its checkpoint: what its training arguments say, checked against its tensors."""

import hashlib
import math
import re
import zlib

import torch

from megatron_router_upcycling.checkpoint import described
from megatron_router_upcycling.checkpoint.dense_model import UNKNOWN_LAYERS, DenseModel
from megatron_router_upcycling.checkpoint.names import (
    ADDED_BY,
    EMBEDDING,
    FC1,
    FC2,
    MODEL_STATE,
    POSITIONS,
    PROJECTION,
    QKV,
    ROUTER,
    holds_experts,
    split_key,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason, shown

MOST_LAYERS = 10_000


def read_model(checkpoint: Checkpoint) -> DenseModel:
    """The dense model in ``checkpoint``, whose arguments its tensors do not contradict."""
    root = checkpoint.root
    _refuse_unknown(checkpoint)
    stored = checkpoint.tensors.get(QKV)
    if stored is None:
        raise UserError(f"{root}: has no tensor {QKV}; convert takes a dense GPT model")
    try:
        model = DenseModel.from_arguments(checkpoint.args, dtype=stored.dtype)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        why = f"has no {error.name}" if isinstance(error, AttributeError) else reason(error)
        raise UserError(
            f"{checkpoint.described_by}: do not give the architecture ({why}); {described.WAY_OUT}"
        ) from None
    _check_numbers(model, checkpoint)
    expected = model.parameters()
    for names in expected:
        if not any(name in checkpoint.tensors for name in names):
            raise UserError(
                f"{root}: has no tensor {names[0]}, which {checkpoint.described_by} asks for;"
                " convert takes a dense GPT model"
            )
    _check_shapes(model, checkpoint)
    known = {POSITIONS, *(name for names in expected for name in names)}
    for name in checkpoint.tensors:
        if MODEL_STATE.match(name) and name not in known:
            flag = next((flag for part, flag in ADDED_BY.items() if re.search(part, name)), "no flag")
            raise UserError(f"{root}: holds {name}, which {flag} adds, and {checkpoint.described_by} lack it")
    return model


def query_key_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over places and CRC-32s of the attention's input weights, which any training step changes.

    ``Checkpoint.digest`` does not see values that a torch_dist checkpoint's files hold. The checksums are
    those that ``torch.save`` wrote beside the values; no value is read where one is there.

    Args:
        checkpoint: stacked over layers, as ``open_dense`` gives it.
    """
    stored, digest = checkpoint.tensors[QKV], hashlib.sha256()
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets):
        values = checkpoint.find_values(chunk, stored.dtype)
        if values:
            checksum = values.checksum
        else:
            tensor = checkpoint.read_chunk(chunk, stored.dtype, bytearray()).contiguous()
            checksum = zlib.crc32(tensor.flatten().view(torch.uint8).numpy())
        digest.update(f"{chunk.offsets} {chunk.sizes} {checksum}\n".encode())
    return digest.hexdigest()


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    root = checkpoint.root
    args = None if holds_experts(checkpoint.tensors) else checkpoint.args
    num_experts = count_experts(checkpoint) if args is None else getattr(args, "num_experts", None)
    if num_experts or args is None:
        experts = f" with {shown(num_experts)} experts" if num_experts else ""
        raise UserError(
            f"DENSE {root}: a Mixture-of-Experts already{experts}; name a dense model's checkpoint"
        )
    for name in UNKNOWN_LAYERS:
        if value := getattr(args, name, None):
            raise UserError(
                f"DENSE {root}: trained with --{name.replace('_', '-')} {shown(value)}, which convert does"
                " not support; it takes GPT models with ordinary attention"
            )


def count_experts(checkpoint: Checkpoint) -> int | None:
    """How many experts a layer has, by the stored router; None where it has no gate for each."""
    for key, tensor in checkpoint.tensors.items():
        if split_key(key)[0] == f"{ROUTER}.weight" and len(tensor.shape) > 1:
            return tensor.shape[-2]
    return None


def _check_numbers(model: DenseModel, checkpoint: Checkpoint) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    for name in (*names, "kv_channels"):
        if getattr(model, name) < 1:
            raise UserError(f"{checkpoint.described_by}: {name} is {getattr(model, name)}")
    if model.num_layers > MOST_LAYERS:
        raise UserError(f"{checkpoint.root}: {model.num_layers} layers; convert takes up to {MOST_LAYERS}")
    if not 0 <= model.init_method_std < math.inf:
        raise UserError(f"{checkpoint.described_by}: init_method_std is {model.init_method_std}")


def _check_shapes(model: DenseModel, checkpoint: Checkpoint) -> None:
    """Compare each size with the stored tensor that has it, then whole shapes."""
    L, D, F, d = model.num_layers, model.hidden_size, model.ffn_hidden_size, model.kv_channels
    H, G = model.num_attention_heads, model.num_query_groups
    if H % G:
        raise UserError(f"{checkpoint.described_by}: {G} query groups do not divide {H} attention heads")
    vocabulary = getattr(checkpoint.args, "vocab_size", None)
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    vocabulary = rows if not isinstance(vocabulary, int) or vocabulary < rows else vocabulary  # padded
    gated = f"{'' if model.gated else 'not '}gated, ffn_hidden_size"
    sizes = (  # setting, tensor and axis that have it, and what it makes of the axis
        ("num_layers", L, QKV, 0, L),
        ("hidden_size", D, QKV, 2, D),
        ("num_attention_heads x kv_channels", H * d, f"{PROJECTION}.weight", 2, H * d),
        ("num_query_groups", G, QKV, 1, (H + 2 * G) * d),
        (gated, F, f"{FC1}.weight", 1, (1 + model.gated) * F),
        ("ffn_hidden_size", F, f"{FC2}.weight", 2, F),
        ("vocab_size", vocabulary, EMBEDDING, 0, vocabulary),
    )
    for setting, value, name, axis, expected in sizes:
        shape = checkpoint.tensors[name].shape
        if axis >= len(shape) or shape[axis] != expected:
            raise UserError(
                f"{checkpoint.described_by}: {setting} {value}, but in {checkpoint.root} {name} is"
                f" {list(shape)}, not {expected} on axis {axis}"
            )
    shapes = {
        f"{FC1}.weight": (L, (1 + model.gated) * F, D),
        f"{FC2}.weight": (L, D, F),
        EMBEDDING: (vocabulary, D),
    }
    for name, whole in shapes.items():
        if (shape := checkpoint.tensors[name].shape) != whole:
            raise UserError(
                f"{checkpoint.root}: {name} is {list(shape)} where {checkpoint.described_by} give"
                f" {list(whole)}"
            )
