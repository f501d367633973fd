"""Read Megatron's legacy checkpoints (``--ckpt-format torch``) as the global tensors they are shards of.

An iteration's folder holds ``mp_rank_XX[_YYY]/model_optim_rng.pt`` for each tensor-parallel rank XX and
pipeline stage YYY: a ``torch.save`` file of arguments, one state dict per virtual stage (``model``, or
``model0``, ``model1``, ...), optimizer and random state. Layers are numbered from 0 in each state dict.

Only the pickles are read, through the allow-list of ``safe_pickle``; a tensor's values stay in the file,
uncompressed and row after row, until someone asks for a chunk.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk, Report, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import Values
from megatron_router_upcycling.checkpoint.legacy.rank_file import (
    RankFile,
    Shard,
    Storage,
    checksum,
    read_blocks,
)
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError

CHUNK_BYTES = 1 << 30  # larger shards are cut between rows
MOST_RANKS = 1000  # of one kind
QKV_PER_GROUP = 2.0  # checkpoint_version from which a group's queries, key and value lie together

# Parameter, stacked over layers -> the axis of one layer's that tensor parallelism cuts; None: every rank has
# it whole.
AXES: dict[str, int | None] = {
    names.EMBEDDING: 0,
    names.POSITIONS: None,
    f"{names.QKV_LINEAR}.weight": 0,
    f"{names.QKV_LINEAR}.bias": 0,
    f"{names.PROJECTION}.weight": 1,
    f"{names.PROJECTION}.bias": None,
    f"{names.FC1}.weight": 0,
    f"{names.FC1}.bias": 0,
    f"{names.FC2}.weight": 1,
    f"{names.FC2}.bias": None,
    names.OUTPUT_LAYER: 0,
}
FUSED_NORMS = (names.NORM_BEFORE_ATTENTION[0], names.NORM_BEFORE_FFN[0])
SEPARATE_NORMS = (names.NORM_BEFORE_ATTENTION[1], names.NORM_BEFORE_FFN[1])
AXES |= {
    f"{norm}{part}": None
    for norm in (*FUSED_NORMS, f"{names.QUERY_NORM}.", f"{names.KEY_NORM}.", f"{names.FINAL_NORM}.")
    for part in ("weight", "bias")
}


@dataclass(frozen=True)
class LegacyCheckpoint(Checkpoint):
    """A legacy checkpoint with the interface of a torch_dist one.

    A chunk's ``blob`` is its bare values. ``objects`` are named only: they hold no parameters.
    """

    storages: dict[Blob, Storage] = field(default_factory=dict)  # of each chunk
    verified: set[Storage] = field(default_factory=set)
    identity: str = ""

    @classmethod
    def open_folder(cls, root: Path, folder: Path, report: Report | None = None) -> "LegacyCheckpoint":
        """Open the legacy checkpoint in ``folder``, an iteration of ``root``."""
        first = RankFile(folder, min(path.name for path in folder.glob("mp_rank_*")))
        stages = _open_ranks(folder, first)
        ranks = [rank for stage in stages for rank in stage]
        parameters, extra_states = _collect(stages)
        self = cls(root, folder, {}, {}, first.common(), identity=_identity(ranks))
        if not getattr(first.args, "untie_embeddings_and_output_weights", True):
            self._tie(parameters)
        gated = bool(getattr(first.args, "swiglu", False) or getattr(first.args, "quick_geglu", False))
        for key, layers in parameters.items():
            self.tensors[key] = self._assemble(key, layers, gated)
        self.objects.update(extra_states)
        for rank in ranks:
            self.objects.update({key: rank.nowhere for key in rank.training_state()})
        return self

    def is_verbatim(self, key: str) -> bool:
        return False

    def digest(self) -> str:
        """SHA-256 over the ranks' pickles and the checksums of all values."""
        return self.identity

    def find_values(self, chunk: Chunk, dtype: torch.dtype) -> Values:
        """Where a chunk's values lie, once their storage is known to hold what was saved."""
        storage, path = self.storages[chunk.blob], self.iteration_dir / chunk.blob.file
        if storage not in self.verified:
            if checksum(path, storage.blob) != storage.checksum:
                raise UserError(
                    f"{path}: damaged within {storage.blob.length} bytes at {storage.blob.offset}"
                    " (checksum); use another copy"
                )
            self.verified.add(storage)
        whole = chunk.blob == storage.blob
        crc = storage.checksum if whole else checksum(path, chunk.blob)
        return Values(chunk.blob.offset, chunk.blob.length, crc)

    def read_blob(self, blob: Blob) -> bytes:
        raise AssertionError("a legacy checkpoint's objects are left out, never read")

    def _assemble(self, key: str, layers: list[list[Shard]], gated: bool) -> StoredTensor:
        """The global tensor of ``layers``' shards, one for each tensor-parallel rank.

        A layer's parameter gets an axis over the layers in front, as in torch_dist.
        """
        stacked, axis = names.is_of_layers(key), AXES[key]
        gated = gated and key.startswith(names.FC1) and axis == 0
        chunks: list[Chunk] = []
        shapes = set()
        for layer, shards in enumerate(layers):
            if axis is None:
                self._check_equal(key, shards)
            self._check_sizes(key, shards, axis or 0, gated)
            placed, shape = _place(shards, axis, gated)
            shapes.add((shape, shards[0].dtype))
            for offsets, shard in placed:
                self.storages[shard.blob] = shard.storage
                front, ones = ((layer,), (1,)) if stacked else ((), ())
                chunks.append(Chunk(front + offsets, ones + shard.shape, shard.blob, shard.shape))
        if len(shapes) != 1:
            raise UserError(f"{self.iteration_dir}: {key} is not of one shape and dtype in all layers")
        ((shape, dtype),) = shapes
        return StoredTensor(((len(layers),) if stacked else ()) + shape, dtype, tuple(chunks))

    def _tie(self, parameters: dict[str, list[list[Shard]]]) -> None:
        """The last pipeline stage's own copy of tied embeddings goes; torch_dist has none."""
        if names.OUTPUT_LAYER in parameters and names.EMBEDDING in parameters:
            (copies,), (embeddings,) = parameters.pop(names.OUTPUT_LAYER), parameters[names.EMBEDDING]
            for pair in zip(embeddings, copies, strict=True):
                self._check_equal("copy of the tied embeddings", list(pair))

    def _check_sizes(self, key: str, shards: list[Shard], axis: int, gated: bool) -> None:
        first = shards[0]
        if any((shard.shape, shard.dtype) != (first.shape, first.dtype) for shard in shards):
            raise UserError(f"{self.iteration_dir}: {key} is not of one shape and dtype on all ranks")
        if len(first.shape) <= axis or (gated and first.shape[0] % 2):
            raise UserError(f"{self.iteration_dir / first.blob.file}: {key} is {list(first.shape)}")

    def _check_equal(self, key: str, shards: list[Shard]) -> None:
        """Shards that are copies of each other must be the same."""
        first, *others = shards
        for other in others:
            same = (other.shape, other.dtype) == (first.shape, first.dtype)
            blocks = (
                read_blocks(self.iteration_dir / shard.blob.file, shard.blob) for shard in (first, other)
            )
            if not same or any(a != b for a, b in zip(*blocks, strict=True)):
                raise UserError(
                    f"{self.iteration_dir / other.blob.file}: its {key} differs from that of"
                    f" {first.blob.file}, which must be the same; use another iteration"
                )


def _open_ranks(folder: Path, first: RankFile) -> list[list[RankFile]]:
    """The files by pipeline stage, then tensor-parallel rank, as the arguments in ``first`` say."""
    tensor, pipeline = _parallel_sizes(first)
    folders = [
        [f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pipeline > 1 else "") for tp in range(tensor)]
        for pp in range(pipeline)
    ]
    found = {path.name for path in folder.glob("mp_rank_*")}
    if surplus := sorted(found.difference(*folders)):
        raise UserError(
            f"{folder / surplus[0]}: not a rank of a dense model saved at tensor parallel {tensor},"
            f" pipeline parallel {pipeline}, as the arguments in {first.file} say"
        )
    stages = [[RankFile(folder, name) for name in stage] for stage in folders]
    for rank in (rank for stage in stages for rank in stage):
        if rank.state.get("iteration") != first.state.get("iteration"):
            raise UserError(f"{rank.path}: of another iteration than {first.path}; use a whole checkpoint")
    return stages


def _parallel_sizes(rank: RankFile) -> tuple[int, int]:
    version = rank.state.get("checkpoint_version")
    if not isinstance(version, int | float) or version < QKV_PER_GROUP:
        raise UserError(
            f"{rank.path}: checkpoint_version {version!r} orders queries, keys and values differently;"
            " load it in Megatron and save it again"
        )
    tensor, pipeline = (
        getattr(rank.args, f"{kind}_model_parallel_size", None) for kind in ("tensor", "pipeline")
    )
    for size in (tensor, pipeline):
        if type(size) is not int or not 0 < size <= MOST_RANKS:
            raise UserError(f"{rank.path}: its arguments do not give tensor and pipeline parallel sizes")
    return tensor, pipeline  # type: ignore[return-value]


def _collect(stages: list[list[RankFile]]) -> tuple[dict[str, list[list[Shard]]], dict[str, Blob]]:
    """Every parameter's shards by layer, then tensor-parallel rank; extra states.

    Both under torch_dist's keys. Extra states hold scaling factors of 8-bit training, which Transformer
    Engine makes anew: they are named, without content.

    Args:
        stages: the files by pipeline stage, then tensor-parallel rank.
    """
    folder = stages[0][0].path.parents[1]
    models = [[rank.models() for rank in stage] for stage in stages]
    parts = len(models[0][0])
    if any(len(model) != parts for stage in models for model in stage):
        raise UserError(f"{folder}: its ranks differ in their number of virtual pipeline stages")
    parameters: dict[str, dict[int, list[Shard]]] = {}
    states: list[tuple[str, int | None, Blob]] = []
    num_layers = 0
    # A token passes the first part of every stage, then the second part of every stage.
    for part, (files, stage) in itertools.product(range(parts), zip(stages, models, strict=True)):
        held = [model[part] for model in stage]
        for file, model in zip(files, held, strict=True):
            if model.keys() != held[0].keys():
                raise UserError(f"{file.path}: holds other parameters than {files[0].file}")
        first_layer = num_layers
        for name in held[0]:
            key, layer = _global_key(name, files[0].path)
            if layer is not None:
                layer += first_layer
                num_layers = max(num_layers, layer + 1)
            if names.EXTRA_STATE in key:
                states.append((key.removesuffix(names.EXTRA_STATE), layer, files[0].nowhere))
                continue
            if (layer or 0) in parameters.setdefault(key, {}):
                raise UserError(f"{files[0].path}: holds {key} a second time")
            parameters[key][layer or 0] = [
                file.shard(name, model[name]) for file, model in zip(files, held, strict=True)
            ]
    for key, layers in parameters.items():
        expected = num_layers if names.is_of_layers(key) else 1
        if len(layers) != expected:
            raise UserError(f"{folder}: holds {key} for {len(layers)} of {expected} layers")
    objects = {
        names.extra_state(module, *([] if layer is None else [(layer, num_layers)])): blob
        for module, layer, blob in states
    }
    return {key: [layers[n] for n in range(len(layers))] for key, layers in parameters.items()}, objects


def _global_key(name: Any, path: Path) -> tuple[str, int | None]:
    """torch_dist's key for an entry of a state dict, and its layer within the stage."""
    key, layer = names.split_key(str(name))
    if key.endswith(names.EXTRA_STATE):
        return key, layer
    for separate, fused in zip(SEPARATE_NORMS, FUSED_NORMS, strict=True):
        # A layer built without Transformer Engine has its norms apart; torch_dist fuses them all the same.
        if layer is not None and key.startswith(separate):
            key = fused + key.removeprefix(separate)
    if key not in AXES or names.is_of_layers(key) != (layer is not None):
        raise UserError(f"{path}: holds {str(name)[:200]!r}, which convert does not know what to make of")
    return key, layer


def _place(
    shards: list[Shard], axis: int | None, gated: bool
) -> tuple[list[tuple[tuple[int, ...], Shard]], tuple[int, ...]]:
    """Where each rank's shard lies in the whole parameter, and the whole's shape.

    A rank's gated FC1 is its gate over its up projection; the whole is all gates over all up projections.
    Shards of more than ``CHUNK_BYTES`` are cut between rows.
    """
    shape = list(shards[0].shape)
    if axis is None:
        shards = shards[:1]
    else:
        shape[axis] = sum(shard.shape[axis] for shard in shards)
    placed: list[tuple[tuple[int, ...], Shard]] = []
    begin = 0  # along ``axis``
    for shard in shards:
        halves = [(begin, shard)]
        if gated:
            half = shard.shape[0] // 2
            halves = [
                (begin // 2, shard.rows(0, half)),
                (shape[0] // 2 + begin // 2, shard.rows(half, 2 * half)),
            ]
        for offset, part in halves:
            step = max(1, CHUNK_BYTES // (part.blob.length // part.shape[0]))
            for row in range(0, part.shape[0], step):
                offsets = [0] * len(shape)
                offsets[axis or 0] += offset
                offsets[0] += row
                piece = part.rows(row, min(row + step, part.shape[0]))
                placed.append((tuple(offsets), piece))
        begin += shard.shape[axis] if axis is not None else 0
    return placed, tuple(shape)


def _identity(ranks: list[RankFile]) -> str:
    digest = hashlib.sha256()
    for rank in ranks:
        digest.update(f"{rank.file} {rank.digest.hexdigest()}\n".encode())
    return digest.hexdigest()
