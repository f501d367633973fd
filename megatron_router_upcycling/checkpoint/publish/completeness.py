"""What lies in a new checkpoint's data files: each chunk looked at, and a digest that a manifest can hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.format import boxes
from megatron_router_upcycling.checkpoint.format.metadata import Blob, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import Damaged, examine
from megatron_router_upcycling.errors import UserError

Target = tuple[boxes.Shape, torch.dtype] | None  # shape and dtype of a tensor, None for an object


def check_whole(
    tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob], targets: Mapping[str, Target]
) -> None:
    """Refuse what is not ``targets``, each as it should be and every element once, and nothing else."""
    made: dict[str, Target] = dict.fromkeys(objects)
    made |= {key: (stored.shape, stored.dtype) for key, stored in tensors.items()}
    wrong = {key for key, _ in made.items() ^ targets.items()}
    for key, stored in tensors.items():
        chunks = [chunk.box for chunk in stored.chunks]
        inside = all(boxes.is_inside(stored.shape, chunk) for chunk in chunks)
        if not inside or any(boxes.faults(stored.shape, chunks)):
            wrong.add(key)
    if wrong:
        raise UserError(
            f"OUT: {min(wrong)} is not what was planned; this is a defect of convert; nothing was left behind"
        )


def examine_all(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob]
) -> dict[Blob, bytes]:
    """``examine`` the bytes of every chunk and object, each once, and return their identities."""
    claims: dict[Blob, tuple[str, Target]] = dict.fromkeys(objects.values(), ("an extra state", None))
    for key, stored in tensors.items():
        claims |= {chunk.blob: (key, (chunk.sizes, stored.dtype)) for chunk in stored.chunks}
    identities = {}
    for blob, (key, promised) in claims.items():
        try:
            identities[blob] = examine(folder, blob, promised).identity
        except Damaged as error:
            what = f"{key} {promised[1]} {list(promised[0])}" if promised else key
            raise UserError(
                f"DENSE: {blob.file}, {blob.length} bytes at {blob.offset}: damaged, should hold {what}"
                f" ({error}); use another copy"
            ) from None
    return identities


def content_digests(identities: Mapping[Blob, bytes]) -> dict[str, str]:
    """For each data file, a SHA-256 over the places of its chunks and all that they claim to hold."""
    digests: dict[str, hashlib._Hash] = {}
    for blob in sorted(identities, key=lambda blob: (blob.file, blob.offset, blob.length)):
        digest = digests.setdefault(blob.file, hashlib.sha256())
        digest.update(f"{blob.offset} {blob.length} ".encode() + identities[blob])
    return {name: digest.hexdigest() for name, digest in digests.items()}
