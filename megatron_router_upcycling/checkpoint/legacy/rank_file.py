"""One rank's file of a legacy checkpoint: its pickle, and where its tensors' values lie.

``torch.save`` writes a zip archive: a pickle that gives each tensor's dtype, shape and storage, and a record
of bytes for each storage, uncompressed. The pickle passes the allow-list of ``safe_load``; the values are
left where they are. One storage may hold many tensors: with the distributed optimizer, all of a rank's.
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
from megatron_router_upcycling.checkpoint.format.torch_save_file import LOCAL_HEADER, STORAGES
from megatron_router_upcycling.errors import UserError

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
                pickled = self._open_archive(content)
        except OSError as error:
            raise UserError(
                f"{self.path}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror};"
                " the checkpoint is incomplete, use one that was saved whole"
            ) from None
        except Exception as error:  # a damaged archive may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.path}: damaged, half-written or saved by PyTorch before 1.6 ({reason})"
            ) from None
        self.state = safe_pickle.loads(pickled, self.path)
        if not isinstance(self.state, dict) or not isinstance(self.args, Namespace):
            raise UserError(f"{self.path}: not a checkpoint that Megatron's training saved")

    def _open_archive(self, content: BinaryIO) -> bytes:
        with zipfile.ZipFile(content) as archive:
            (pickle_name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            self.prefix = pickle_name.removesuffix("data.pkl")
            self.records = {record.filename: record for record in archive.infolist()}
            for record in self.records.values():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{record.filename} is compressed, which torch.save never does")
                if record.header_offset + record.file_size > archive.start_dir:
                    raise ValueError(f"{record.filename} does not lie within the file")
                self.digest.update(f"{record.filename} {record.file_size} {record.CRC}\n".encode())
            byteorder = self.records.get(f"{self.prefix}byteorder")
            if byteorder and archive.read(byteorder) != b"little":
                raise ValueError("its values are not in little-endian order")
            return archive.read(pickle_name)

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
        if type(value).__name__ == "_rebuild_parameter":
            value = value.args[0]
        if type(value).__name__ != "_rebuild_tensor_v2":
            raise UserError(f"{self.path}: {key} is a {type(value).__name__}, not a plain tensor")
        try:
            storage, first, shape, stride, *_ = value.args
            _, kind, name, _, _ = storage.args[0]
            dtype, record = STORAGES[kind.__name__], self.records[f"{self.prefix}data/{name}"]
            shape, begin = tuple(map(int, shape)), int(first) * dtype.itemsize
            steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            plain = all(a == b or size == 1 for a, b, size in zip(stride, steps, shape, strict=True))
            length = math.prod(shape) * dtype.itemsize
            inside = begin >= 0 and length > 0 and begin + length <= record.file_size
            if min(shape, default=1) < 1 or not inside or not plain:
                raise ValueError("its values do not lie row after row")
            start = self._start(record)
        except Exception as error:  # a damaged pickle or archive may be wrong in any way
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: {key} cannot be read ({type(error).__name__}: {reason})") from None
        whole = Storage(Blob(self.file, start, record.file_size), record.CRC)
        return Shard(shape, dtype, Blob(self.file, start + begin, length), whole)

    def _start(self, record: zipfile.ZipInfo) -> int:
        """Offset of a record's content: its local header is of any length."""
        with open(self.path, "rb") as file:
            file.seek(record.header_offset)
            *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        return record.header_offset + LOCAL_HEADER.size + name_length + extra_length


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
