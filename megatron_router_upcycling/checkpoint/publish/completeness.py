"""What lies in a new checkpoint's data files: each chunk looked at, and a digest that a manifest can hold."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.format import boxes
from megatron_router_upcycling.checkpoint.format.files import FileRange
from megatron_router_upcycling.checkpoint.format.metadata import Blob, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import Damaged, examine
from megatron_router_upcycling.errors import UserError

Target = tuple[tuple[int, ...], torch.dtype] | None  # shape and dtype of a tensor, None for an object


def check_whole(
    tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob], targets: Mapping[str, Target]
) -> None:
    """Refuse what is not ``targets``, each as it should be and every element once, and nothing else."""

    def check(right: bool, key: str, what: str) -> None:
        if not right:
            raise UserError(f"OUT: {key} {what}; this is a defect of convert, and nothing was left behind")

    for key in {*tensors, *objects} | set(targets):
        check(key in targets, key, "was not planned")
        check(key in tensors if targets[key] else key in objects, key, "was not made")
    for key, stored in tensors.items():
        check((stored.shape, stored.dtype) == targets[key], key, f"is {stored.dtype} {list(stored.shape)}")
        chunks = [boxes.Box(chunk.offsets, chunk.sizes) for chunk in stored.chunks]
        check(all(boxes.is_inside(stored.shape, chunk) for chunk in chunks), key, "has a chunk outside it")
        check(not any(boxes.faults(stored.shape, chunks)), key, "has gaps or overlapping chunks")


def examine_all(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, Blob]
) -> dict[Blob, bytes]:
    """Look at the bytes of every chunk and object, each once, and return their identities.

    All is read but the values themselves: a chunk is a whole ``torch.save`` file and holds a tensor of the
    dtype and sizes that it goes by.
    """
    claims: dict[Blob, tuple[str, tuple[int, ...], torch.dtype] | None] = dict.fromkeys(objects.values())
    for key, stored in tensors.items():
        claims |= {chunk.blob: (key, chunk.sizes, stored.dtype) for chunk in stored.chunks}
    identities = {}
    for name in sorted({blob.file for blob in claims}):
        with open(folder / name, "rb", buffering=0) as file:
            for blob in sorted((blob for blob in claims if blob.file == name), key=lambda blob: blob.offset):
                claim = claims[blob]
                try:
                    contents = examine(io.BufferedReader(FileRange(file, blob)), blob.length)
                    if claim and contents.values and (contents.sizes, contents.dtype) != claim[1:]:
                        raise Damaged(f"holds {contents.dtype} {list(contents.sizes or ())}")
                except Damaged as error:
                    what = f"{claim[0]} {claim[2]} {list(claim[1])}" if claim else "an extra state"
                    raise UserError(
                        f"DENSE: {name}, {blob.length} bytes at {blob.offset}: damaged, should hold {what}"
                        f" ({error}); use another copy"
                    ) from None
                identities[blob] = contents.identity
    return identities


def content_digests(identities: Mapping[Blob, bytes]) -> dict[str, str]:
    """For each data file, a SHA-256 over places and identities (``examine.Contents``) of its chunks.

    Their identities hold the CRC-32 of the values, so the digest tells whether a file's chunks claim to
    hold what they held. That they do hold it, only reading them tells.
    """
    digests: dict[str, hashlib._Hash] = {}
    for blob in sorted(identities, key=lambda blob: (blob.file, blob.offset, blob.length)):
        digest = digests.setdefault(blob.file, hashlib.sha256())
        digest.update(f"{blob.offset} {blob.length} ".encode() + identities[blob])
    return {name: digest.hexdigest() for name, digest in digests.items()}
