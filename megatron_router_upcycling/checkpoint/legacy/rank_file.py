"""One rank's file of a legacy checkpoint: its pickle, and where its tensors' values lie.

The pickle gives each tensor's dtype, shape and storage; a storage's values are a record beside it and stay
where they are. One storage may hold many tensors: with the distributed optimizer, all of a rank's.
"""

import functools
import hashlib
import math
import re
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.format.torch_save_file import (
    STORAGES,
    PickledTensor,
    TorchSaveFile,
    is_row_major,
    pickled_tensor,
    record_start,
)
from megatron_router_upcycling.errors import UserError, reason

RANK_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"  # of the distributed optimizer
READ_BYTES = 8 << 20
MODEL = re.compile(r"model(\d{0,3})")  # one state dict, or one for each virtual pipeline stage


@dataclass(frozen=True)
class Storage:
    """A record of values in a rank's file, and the CRC-32 that stands beside it."""

    blob: Blob
    checksum: int


@dataclass(frozen=True)
class Shard:
    """One rank's part of a parameter: ``shape`` values, row after row, at ``blob``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blob: Blob
    storage: Storage

    def rows(self, begin: int, end: int) -> "Shard":
        """Rows ``begin`` to ``end`` of it."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        blob = Blob(self.blob.file, self.blob.offset + begin * row, (end - begin) * row)
        return Shard((end - begin, *self.shape[1:]), self.dtype, blob, self.storage)


class RankFile:
    """The pickle of one ``model_optim_rng.pt`` and the places of its values."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = f"{name}/{RANK_FILE}"
        self.path = folder / self.file
        self.name = name
        self.nowhere = Blob(self.file, 0, 0)  # of what is named only
        self.has_optimizer_file = (folder / name / OPTIMIZER_FILE).is_file()
        self.digest = hashlib.sha256()
        self.records: dict[str, zipfile.ZipInfo] = {}
        try:
            with open(self.path, "rb") as content:
                pickled = self._read_archive(content)
        except OSError as error:
            raise UserError(
                f"{self.path}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror};"
                " the checkpoint is incomplete, use one that was saved whole"
            ) from None
        except Exception as error:  # a damaged archive may fail in any way
            raise UserError(
                f"{self.path}: damaged, half-written or saved by PyTorch before 1.6 ({reason(error)})"
            ) from None
        self.state = safe_pickle.loads(pickled, self.path)
        if not isinstance(self.state, dict) or not isinstance(self.args, Namespace):
            raise UserError(f"{self.path}: not a checkpoint that Megatron's training saved")

    def _read_archive(self, content: BinaryIO) -> bytes:
        file = TorchSaveFile(content)
        self.prefix, self.records = file.prefix, file.records
        for info in file.infos:
            if info.header_offset + info.file_size > file.end:
                raise ValueError(f"{info.filename} does not lie within the file")
            self.digest.update(f"{info.filename} {info.file_size} {info.CRC}\n".encode())
        file.check_byte_order()
        return file.pickle()

    @property
    def args(self) -> Any:
        return self.state.get("args")

    def common(self) -> dict[str, Any]:
        """What all ranks share, without the model."""
        left = ("optimizer", "rng_state", "rerun_state_machine")
        common = {
            key: value
            for key, value in self.state.items()
            if isinstance(key, str) and not MODEL.fullmatch(key) and key not in left
        }
        # Options that name classes of an older Megatron, which a new one could not import again.
        values = vars(self.args).items()
        args = {name: value for name, value in values if isinstance(name, str) and _is_carried(value)}
        return common | {"args": safe_pickle.namespace(args)}

    def training_state(self) -> Iterator[str]:
        """Names of what is not the model's."""
        if "optimizer" in self.state:
            yield f"optimizer.{self.name}"
        if self.has_optimizer_file:
            yield f"optimizer.{self.name}/{OPTIMIZER_FILE}"
        for key in ("rng_state", "rerun_state_machine"):
            if key in self.state:
                yield f"{'rerun_state_machine_state' if key.startswith('rerun') else key}/{self.name}"

    def models(self) -> list[dict[str, Any]]:
        """The state dicts of this rank's virtual pipeline stages, in order."""
        found = sorted(
            (int(match[1] or 0), key)
            for key in self.state
            if isinstance(key, str) and (match := MODEL.fullmatch(key))
        )
        models = [self.state[key] for _, key in found]
        if [number for number, _ in found] != list(range(len(found))) or not models:
            raise UserError(f"{self.path}: holds no model")
        for model in models:
            if not isinstance(model, dict) or "language_model" in model:
                raise UserError(
                    f"{self.path}: a model from before Megatron-Core; convert it to a Megatron-Core"
                    " model first"
                )
        return models

    def shard(self, key: str, value: Any) -> Shard:
        """Where the tensor ``value``, as the pickle has it, lies in the file."""
        try:
            if type(value).__name__ == "_rebuild_parameter":
                value = value.args[0]
            tensor = pickled_tensor(value)
            shard = tensor and self._shard(tensor)
        except Exception as error:  # a damaged pickle or archive may be wrong in any way
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{self.path}: {key} cannot be read ({what})") from None
        if shard is None:
            raise UserError(f"{self.path}: {key} is a {type(value).__name__}, not a plain tensor")
        return shard

    def _shard(self, tensor: PickledTensor) -> Shard:
        dtype, info = STORAGES[tensor.storage], self.records[self.prefix + tensor.record]
        shape, begin = tuple(map(int, tensor.sizes)), int(tensor.first) * dtype.itemsize
        length = math.prod(shape) * dtype.itemsize
        inside = begin >= 0 and length > 0 and begin + length <= info.file_size
        if min(shape, default=1) < 1 or not inside or not is_row_major(shape, tensor.stride):
            raise ValueError("its values do not lie row after row")
        with open(self.path, "rb") as file:
            start = record_start(file, info)
        whole = Storage(Blob(self.file, start, info.file_size), info.CRC)
        return Shard(shape, dtype, Blob(self.file, start + begin, length), whole)


def _is_carried(value: Any) -> bool:
    try:
        safe_pickle.dumps(value)
    except Exception:  # pickle raises what it likes
        return False
    return True


def read_blocks(path: Path, blob: Blob) -> Iterator[bytes]:
    """A blob's bytes, ``READ_BYTES`` at a time."""
    try:
        with open(path, "rb") as file:
            file.seek(blob.offset)
            left = blob.length
            while left:
                block = file.read(min(left, READ_BYTES))
                if not block:
                    raise UserError(f"{path}: ends early; it has changed since it was opened")
                yield block
                left -= len(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def checksum(path: Path, blob: Blob) -> int:
    return functools.reduce(lambda crc, block: zlib.crc32(block, crc), read_blocks(path, blob), 0)
