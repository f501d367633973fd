"""A dense model read from its checkpoint: what its training arguments say, checked against its tensors."""

import hashlib
import math
import zlib
from argparse import Namespace

import torch

from megatron_router_upcycling.checkpoint.dense_model import UNKNOWN_LAYERS, DenseModel
from megatron_router_upcycling.checkpoint.names import FC1, FC2, QKV, holds_experts
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason, shown

MOST_LAYERS = 10_000


def read_model(checkpoint: Checkpoint) -> DenseModel:
    """The dense model in ``checkpoint``.

    Raises:
        UserError: an MoE, layers that the converter does not know, or arguments that the stored tensors
            contradict.
    """
    root, args = checkpoint.root, checkpoint.args
    _refuse_unknown(checkpoint, args)
    stored = checkpoint.tensors.get(QKV)
    if stored is None:
        raise UserError(f"{root}: has no tensor {QKV}; convert takes a dense GPT model")
    try:
        model = DenseModel.from_arguments(args, dtype=stored.dtype)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{root}: its training arguments do not give the architecture ({reason(error)})"
        ) from None
    _check_numbers(model, checkpoint)
    for names in model.parameters():
        if not any(name in checkpoint.tensors for name in names):
            raise UserError(
                f"{root}: has no tensor {names[0]}, which its training arguments ask for;"
                " convert takes a dense GPT model"
            )
    _check_shapes(model, checkpoint)
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


def _refuse_unknown(checkpoint: Checkpoint, args: Namespace) -> None:
    root = checkpoint.root
    num_experts = getattr(args, "num_experts", None)
    if num_experts or holds_experts(checkpoint.tensors):
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


def _check_numbers(model: DenseModel, checkpoint: Checkpoint) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    for name in (*names, "kv_channels"):
        if getattr(model, name) < 1:
            raise UserError(f"{checkpoint.root}: its training arguments say {name} {getattr(model, name)}")
    if model.num_layers > MOST_LAYERS:
        raise UserError(f"{checkpoint.root}: {model.num_layers} layers; convert takes up to {MOST_LAYERS}")
    if not 0 <= model.init_method_std < math.inf:
        raise UserError(
            f"{checkpoint.root}: its training arguments say init_method_std {model.init_method_std}"
        )


def _check_shapes(model: DenseModel, checkpoint: Checkpoint) -> None:
    L, D, F, d = model.num_layers, model.hidden_size, model.ffn_hidden_size, model.kv_channels
    H, G = model.num_attention_heads, model.num_query_groups
    if H % G:
        raise UserError(f"{checkpoint.root}: {G} query groups do not divide {H} attention heads")
    expected = {
        QKV: (L, (H + 2 * G) * d, D),
        f"{FC1}.weight": (L, (1 + model.gated) * F, D),
        f"{FC2}.weight": (L, D, F),
    }
    for name, shape in expected.items():
        stored = checkpoint.tensors[name].shape
        if stored != shape:
            raise UserError(
                f"{checkpoint.root}: {name} is {list(stored)} where the training arguments give"
                f" {list(shape)} (layers {L}, hidden {D}, FFN {F}, heads {H}, groups {G}, head size {d})"
            )
