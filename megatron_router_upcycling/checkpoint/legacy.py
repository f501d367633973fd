"""Read Megatron's legacy checkpoints (``--ckpt-format torch``): their shards, as parts of global tensors.

An iteration's folder holds ``mp_rank_XX[_YYY]/model_optim_rng.pt`` for each tensor-parallel rank XX and
pipeline stage YYY: a ``torch.save`` file of arguments, one state dict per virtual stage (``model``, or
``model0``, ``model1``, ...), optimizer and random state. Layers are numbered from 0 in each state dict.
Opening reads the pickles, and of the values only replicated ones. One storage may hold many tensors, or all
of a rank's.
"""

import functools
import hashlib
import itertools
import math
import re
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.boxes import Shape
from megatron_router_upcycling.checkpoint.format.metadata import Blob, Chunk, StoredTensor
from megatron_router_upcycling.checkpoint.format.torch_save_file import TorchSaveFile, Values, pickled_tensor
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, described, error_as, os_error_as, shown

RANK_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"  # of the distributed optimizer
TRAINING_STATE = {
    "optimizer": "optimizer.",
    "rng_state": "rng_state/",
    "rerun_state_machine": "rerun_state_machine_state/",
}
MODEL = re.compile(r"model(\d{0,3})")  # one state dict, or one for each virtual pipeline stage
READ_BYTES = 8 << 20
CHUNK_BYTES = 1 << 30  # larger shards are cut between rows
QKV_PER_GROUP = 2.0  # checkpoint_version from which a group's queries, key and value lie together

# Without Transformer Engine a layer's norms have names of their own; torch_dist uses the fused names anyway.
FUSED_NORMS = dict((names.NORM_BEFORE_ATTENTION[::-1], names.NORM_BEFORE_FFN[::-1]))
# Stacked name of a parameter -> the axis of one layer's that tensor parallelism shards; None: replicated.
AXES: dict[str, int | None] = {names.EMBEDDING: 0, names.POSITIONS: None, names.OUTPUT_LAYER: 0}
for linear in (names.QKV_LINEAR, names.FC1):
    AXES |= {f"{linear}.weight": 0, f"{linear}.bias": 0}
for linear in (names.PROJECTION, names.FC2):
    AXES |= {f"{linear}.weight": 1, f"{linear}.bias": None}
for norm in (*FUSED_NORMS.values(), f"{names.QUERY_NORM}.", f"{names.KEY_NORM}.", f"{names.FINAL_NORM}."):
    AXES |= {f"{norm}weight": None, f"{norm}bias": None}


@dataclass(frozen=True)
class Shard:
    """One rank's shard of a parameter: row-major values at ``blob``, a part of ``storage``."""

    shape: Shape
    dtype: torch.dtype
    blob: Blob
    storage: Values

    def rows(self, begin: int, end: int) -> "Shard":
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        blob = Blob(self.blob.file, self.blob.offset + begin * row, (end - begin) * row)
        return Shard((end - begin, *self.shape[1:]), self.dtype, blob, self.storage)


class RankFile:
    """The pickle of one ``model_optim_rng.pt`` and the locations of its values."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.file = name, f"{name}/{RANK_FILE}"
        self.path = folder / self.file
        fault = f"{self.path}: missing, damaged, half-written or saved by PyTorch before 1.6"
        read = error_as(Exception, fault, "; use a checkpoint that was saved whole")  # it may fail in any way
        with read, open(self.path, "rb") as content:
            file = TorchSaveFile(content)
            pickled = file.pickle()
        self.prefix, self.records = file.prefix, file.records
        self.state = safe_pickle.loads(pickled, self.path)
        if not isinstance(self.state, dict) or not isinstance(self.state.get("args"), Namespace):
            raise UserError(f"{self.path}: not a checkpoint that Megatron's training saved")
        self.args = self.state["args"]

    def identity(self) -> str:
        """The file's name, and a SHA-256 over the pickle's and all values' checksums."""
        lines = [f"{name} {values.length} {values.checksum}\n" for name, values in self.records.items()]
        return f"{self.file} {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"

    def common(self) -> dict[str, Any]:
        """What all ranks share: arguments, iteration and version."""
        common = {key: self.state[key] for key in ("checkpoint_version", "iteration") if key in self.state}
        args = {name: value for name, value in vars(self.args).items() if _is_carried(name, value)}
        return common | {"args": safe_pickle.namespace(args)}

    def training_state(self) -> dict[str, Blob]:
        """The names of the entries that are not the model's, with empty blobs."""
        found = [f"{name}{self.name}" for kind, name in TRAINING_STATE.items() if kind in self.state]
        if (self.path.parent / OPTIMIZER_FILE).is_file():
            found.append(f"optimizer.{self.name}/{OPTIMIZER_FILE}")
        return dict.fromkeys(found, Blob(self.file, 0, 0))

    def models(self) -> list[dict[str, Any]]:
        """The state dicts of this rank's virtual pipeline stages, in order."""
        texts = (key for key in self.state if isinstance(key, str))
        found = sorted((int(match[1] or 0), key) for key in texts if (match := MODEL.fullmatch(key)))
        models = [self.state[key] for _, key in found]
        older = any(not isinstance(model, dict) or "language_model" in model for model in models)
        if not models or [number for number, _ in found] != list(range(len(found))) or older:
            raise UserError(f"{self.path}: no model of Megatron-Core; convert an older one to that first")
        return models

    def shard(self, key: str, value: Any) -> Shard:
        """Locate the values of the pickled tensor ``value`` in the file."""
        # A damaged pickle or archive may be wrong in any way.
        with error_as(Exception, f"{self.path}: {key} cannot be read", say=described):
            value = value.args[0] if type(value).__name__ == "_rebuild_parameter" else value
            tensor = pickled_tensor(value)
            if tensor is None:
                raise TypeError(f"a {type(value).__name__}, not a plain tensor")
            dtype, storage = tensor.dtype, self.records[self.prefix + tensor.record]
            shape, begin = tuple(map(int, tensor.sizes)), int(tensor.first) * dtype.itemsize
            length = math.prod(shape) * dtype.itemsize
            inside = begin >= 0 and length > 0 and begin + length <= storage.length
            if min(shape, default=1) < 1 or not inside or not tensor.row_major or not dtype.is_floating_point:
                raise ValueError(f"its values, {dtype}, are no floating-point numbers that lie row after row")
        return Shard(shape, dtype, Blob(self.file, storage.offset + begin, length), storage)


def _is_carried(name: Any, value: Any) -> bool:
    """Whether an argument can be saved again: it holds no class that a newer Megatron could not import."""
    try:
        safe_pickle.dumps(value)
    except Exception:  # pickle raises what it likes
        return False
    return isinstance(name, str)


@dataclass(frozen=True)
class LegacyCheckpoint(Checkpoint):
    """A chunk's ``blob`` is its bare values. ``objects``, the training state, are names with empty blobs."""

    storages: dict[Blob, Values] = field(default_factory=dict)  # of each chunk
    verified: set[tuple[str, Values]] = field(default_factory=set)
    identity: str = ""

    @classmethod
    def open(cls, root: Path, folder: Path) -> "LegacyCheckpoint":
        """Open the legacy checkpoint in ``folder``, an iteration of ``root``."""
        first = RankFile(folder, min(path.name for path in folder.glob("mp_rank_*")))
        stages = _open_ranks(folder, first)
        parameters = _collect(stages)
        ranks = list(itertools.chain(*stages))
        self = cls(root, folder, {}, {}, first.common(), identity="".join(rank.identity() for rank in ranks))
        tied = not getattr(first.args, "untie_embeddings_and_output_weights", True)
        if tied and parameters.keys() >= {names.OUTPUT_LAYER, names.EMBEDDING}:
            # The last pipeline stage's copy, which torch_dist does not store.
            (copies,), (embeddings,) = parameters.pop(names.OUTPUT_LAYER), parameters[names.EMBEDDING]
            for pair in zip(embeddings, copies, strict=True):
                self._check_equal("copy of the tied embeddings", list(pair))
        gated = bool(getattr(first.args, "swiglu", False) or getattr(first.args, "quick_geglu", False))
        for key, layers in parameters.items():
            self.tensors[key] = self._assemble(key, layers, gated)
        for rank in ranks:
            self.objects.update(rank.training_state())
        return self

    def digest(self) -> str:
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def _find_values(self, chunk: Chunk, dtype: torch.dtype) -> Values:
        storage, blob = self.storages[chunk.blob], chunk.blob
        if (blob.file, storage) not in self.verified:
            if self._checksum(Blob(blob.file, storage.offset, storage.length)) != storage.checksum:
                raise self._damaged(chunk, ValueError("checksum"))
            self.verified.add((blob.file, storage))
        place = blob.offset, blob.length
        return storage if place == storage[:2] else Values(*place, self._checksum(blob))

    def _checksum(self, blob: Blob) -> int:
        return functools.reduce(lambda crc, block: zlib.crc32(block, crc), self._read_blocks(blob), 0)

    def _read_blocks(self, blob: Blob) -> Iterator[bytes]:
        path = self.iteration_dir / blob.file
        with os_error_as(f"{path}: cannot be read"), open(path, "rb") as file:
            file.seek(blob.offset)
            for done in range(0, blob.length, READ_BYTES):
                yield file.read(min(READ_BYTES, blob.length - done))

    def _assemble(self, key: str, layers: list[list[Shard]], gated: bool) -> StoredTensor:
        """The global tensor of ``layers``' shards; a layer's parameter is stacked over layers on axis 0."""
        stacked, axis, first = names.is_of_layers(key), AXES[key], layers[0][0]
        gated = gated and key.startswith(names.FC1) and axis == 0
        alike = {(shard.shape, shard.dtype) for layer in layers for shard in layer}
        if len(alike) > 1 or len(first.shape) <= (axis or 0) or (gated and first.shape[0] % 2):
            raise UserError(
                f"{self.iteration_dir / first.blob.file}: {key} is {list(first.shape)}, or not of one shape"
                " and dtype in all layers and on all ranks"
            )
        chunks: list[Chunk] = []
        shape = first.shape
        for layer, shards in enumerate(layers):
            if axis is None:
                self._check_equal(key, shards)
            placed, shape = _place(shards, axis, gated)
            for offsets, shard in placed:
                self.storages[shard.blob] = shard.storage
                front, ones = ((layer,), (1,)) if stacked else ((), ())
                chunks.append(Chunk(front + offsets, ones + shard.shape, shard.blob, shard.shape))
        return StoredTensor(((len(layers),) if stacked else ()) + shape, first.dtype, tuple(chunks))

    def _check_equal(self, key: str, shards: list[Shard]) -> None:
        """Refuse replicated shards that differ."""
        first, *others = shards
        for other in others:
            blocks = zip(self._read_blocks(first.blob), self._read_blocks(other.blob), strict=True)
            same = (other.shape, other.dtype) == (first.shape, first.dtype)
            if not same or any(a != b for a, b in blocks):
                raise UserError(
                    f"{self.iteration_dir / other.blob.file}: its {key} differs from that of"
                    f" {first.blob.file}, which must be the same; use another iteration"
                )


def _open_ranks(folder: Path, first: RankFile) -> list[list[RankFile]]:
    """The files by pipeline stage, then tensor-parallel rank."""
    version = first.state.get("checkpoint_version")
    if not isinstance(version, int | float) or version < QKV_PER_GROUP:
        raise UserError(
            f"{first.path}: checkpoint_version {version!r} orders queries, keys and values differently;"
            " load it in Megatron and save it again"
        )
    tensor = getattr(first.args, "tensor_model_parallel_size", None)
    pipeline = getattr(first.args, "pipeline_model_parallel_size", None)
    found, stages = {path.name for path in folder.glob("mp_rank_*")}, []
    if type(tensor) is int and type(pipeline) is int and tensor * pipeline == len(found):
        ends = [f"_{stage:03d}" if pipeline > 1 else "" for stage in range(pipeline)]
        stages = [[f"mp_rank_{rank:02d}{end}" for rank in range(tensor)] for end in ends]
    if found != {name for stage in stages for name in stage}:
        raise UserError(
            f"{folder}: its {len(found)} folders mp_rank_* are not those of a dense model at tensor parallel"
            f" {shown(tensor)}, pipeline parallel {shown(pipeline)}, as the arguments in {first.file} say"
        )
    files = [[RankFile(folder, name) for name in stage] for stage in stages]
    if len({shown(rank.state.get("iteration")) for rank in itertools.chain(*files)}) > 1:
        raise UserError(f"{folder}: its ranks are of different iterations; use a whole checkpoint")
    return files


def _collect(stages: list[list[RankFile]]) -> dict[str, list[list[Shard]]]:
    """torch_dist's key -> a parameter's shards by layer, then tensor-parallel rank; no extra states."""
    folder = stages[0][0].path.parents[1]
    models = [[rank.models() for rank in stage] for stage in stages]
    parts = {len(model) for stage in models for model in stage}
    if len(parts) > 1:
        raise UserError(f"{folder}: its ranks differ in their number of virtual pipeline stages")
    parameters: dict[str, dict[int, list[Shard]]] = {}
    num_layers = 0
    # A token passes the first part of every stage, then the second part of every stage.
    for part, (files, stage) in itertools.product(range(*parts), zip(stages, models, strict=True)):
        held = [model[part] for model in stage]
        if any(model.keys() != held[0].keys() for model in held):
            raise UserError(f"{files[0].path}: another rank of its stage holds other parameters")
        first_layer = num_layers
        for name in held[0]:
            if names.EXTRA_STATE in str(name):
                continue
            key, layer = _global_key(name, files[0].path)
            if layer is not None:
                layer += first_layer
                num_layers = max(num_layers, layer + 1)
            if (layer or 0) in parameters.setdefault(key, {}):
                raise UserError(f"{files[0].path}: holds {key} a second time")
            shards = [file.shard(name, model[name]) for file, model in zip(files, held, strict=True)]
            parameters[key][layer or 0] = shards
    for key, layers in parameters.items():
        expected = num_layers if names.is_of_layers(key) else 1
        if len(layers) != expected:
            raise UserError(f"{folder}: holds {key} for {len(layers)} of {expected} layers")
    return {key: [layers[n] for n in range(len(layers))] for key, layers in parameters.items()}


def _global_key(name: Any, path: Path) -> tuple[str, int | None]:
    """torch_dist's key for an entry of a state dict, and its layer within the stage."""
    key, layer = names.split_key(str(name))
    for separate, fused in FUSED_NORMS.items() if layer is not None else ():
        key = fused + key.removeprefix(separate) if key.startswith(separate) else key
    if key not in AXES or names.is_of_layers(key) != (layer is not None):
        raise UserError(f"{path}: holds {str(name)[:200]!r}, which convert does not support")
    return key, layer


def _place(shards: list[Shard], axis: int | None, gated: bool) -> tuple[list[tuple[Shape, Shard]], Shape]:
    """The offset of each rank's shard, cut into at most ``CHUNK_BYTES``, in the global tensor, and its shape.

    A rank's gated FC1 is its gate above its up projection; the whole is all gates above all up projections.
    """
    shape, count = list(shards[0].shape), len(shards)
    pieces = [(0, shards[0])]  # each with its offset along ``axis``
    if axis is not None:
        size = shape[axis]
        pieces = [(rank * size, shard) for rank, shard in enumerate(shards)]
        if gated:
            half = size // 2
            gates = [(rank * half, shard.rows(0, half)) for rank, shard in enumerate(shards)]
            ups = [((count + rank) * half, shard.rows(half, size)) for rank, shard in enumerate(shards)]
            pieces = gates + ups
        shape[axis] = count * size
    placed: list[tuple[Shape, Shard]] = []
    for offset, piece in pieces:
        step = max(1, CHUNK_BYTES // (piece.blob.length // piece.shape[0]))
        for row in range(0, piece.shape[0], step):
            offsets = [0] * len(shape)
            offsets[axis or 0] += offset
            offsets[0] += row
            placed.append((tuple(offsets), piece.rows(row, min(row + step, piece.shape[0]))))
    return placed, tuple(shape)
