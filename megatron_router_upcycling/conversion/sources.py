"""The dense models of ``--experts``: that they fit DENSE, and what the manifest records of them.

Experts of several models: Branch-Train-MiX (arXiv 2403.07816), which also averages all that is no FFN.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside, names
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.read_model import checksum, read_model
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.start import OF_TEXTS
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError, shown


def open_sources(dense: Checkpoint, model: DenseModel, options: Options) -> tuple[Checkpoint, ...]:
    """Open the models of ``--experts``; UserError, which names the first difference, for one unlike DENSE."""
    count, copies = len(options.experts), options.router.num_copies
    if count and copies % count:
        raise UserError(
            f"--experts: {count} models for --num-experts {copies}; make it a multiple of {count}"
        )
    if options.average_rest and (count < 2 or options.shared_expert):
        why = "leave --shared-expert out" if count > 1 else "name two models or more as --experts"
        raise UserError(f"--average-rest: {why}")
    return tuple(_open(dense, model, path, options.average_rest) for path in options.experts)


def check_texts(options: Options) -> None:
    """Refuse a number of --key-stats that does not go with the experts' models or the gate."""
    count, models, gate = len(options.key_stats), len(options.experts), options.init.gate
    if models and count not in (1, models):
        why = f"{count} files for {models} models of --experts; give one of each model's text, in their order"
        raise UserError(f"--key-stats: {why}, or a single one")
    if gate in OF_TEXTS and (count < 2 or options.router.num_copies % count):
        what = "tells texts apart: give one file for each, two or more that divide --num-experts"
        raise UserError(f"--key-stats: {count} files, and --gate {gate} {what}")


def _open(dense: Checkpoint, model: DenseModel, path: Path, whole: bool) -> Checkpoint:
    """Open one; ``whole``: not only its FFNs are read."""
    try:
        source = open_dense(path, dense.config)
        other = read_model(source)
    except UserError as error:
        raise UserError(f"--experts: {str(error).removeprefix('DENSE ')}") from None
    for what, theirs, ours in _compared(source, other, dense, model, whole):
        if theirs != ours:
            found = f"{what} {shown(theirs)}, where DENSE {dense.root} has {shown(ours)}"
            raise UserError(f"--experts {path}: {found}; name models of one architecture and tokenizer")
    return source


def _compared(
    source: Checkpoint, other: DenseModel, dense: Checkpoint, model: DenseModel, whole: bool
) -> Iterator[tuple[str, Any, Any]]:
    """What two models must have in common: its name, theirs and DENSE's."""
    for flag in sorted(other.flags.keys() | model.flags.keys()):
        yield flag, other.flags.get(flag), model.flags.get(flag)
    yield "dtype", str(other.dtype), str(model.dtype)
    vocabularies = [getattr(one.args, "vocab_size", None) for one in (source, dense)]
    if None not in vocabularies:
        yield "vocab_size", vocabularies[0], vocabularies[1]
    for key, stored in dense.tensors.items():
        if names.MODEL_STATE.match(key) and (whole or names.is_ffn(key) or key == names.EMBEDDING):
            yield key, list(source.tensors[key].shape) if key in source.tensors else None, list(stored.shape)
    theirs, ours = (beside.tokens(one.root / beside.FOLDER) for one in (source, dense))
    for place in sorted(theirs.keys() & ours.keys(), key=str):
        yield f"tokenizer's {place}", theirs[place], ours[place]


def values_digest(checkpoint: Checkpoint, expert: int | None = None) -> str:
    """SHA-256 over the places and CRC-32s of the FFN's values: of a dense model, or of one expert of an MoE.

    It is the same for both where they hold the same values in the same chunks.
    """
    lines = []
    for key, stored in checkpoint.tensors.items():
        name, layer = names.split_key(key)
        part = name.removeprefix(names.MLP if expert is None else names.EXPERTS)
        if not (names.is_ffn(name) if expert is None else name.startswith(f"{names.EXPERTS}.")):
            continue
        for chunk in stored.chunks:
            first = chunk.offsets[0] if layer is None else layer
            offsets, sizes = (place[int(layer is None) :] for place in (chunk.offsets, chunk.sizes))
            if expert is not None:
                if offsets[0] != expert:
                    continue
                offsets, sizes = offsets[1:], sizes[1:]
            lines.append(f"{part} {first} {offsets} {sizes} {checksum(checkpoint, chunk, stored.dtype)}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
