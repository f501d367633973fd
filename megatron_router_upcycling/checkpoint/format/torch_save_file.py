"""Read and write ``torch.save`` files without loading a tensor's values.

Such a file is an uncompressed zip archive: a pickle, a few small records, and the values of each storage as
they lie in memory, with a CRC-32. Reshaping a tensor changes the pickle alone; the kernel can copy the values
from file to file, and their stored checksum remains valid.
"""

import functools
import hashlib
import io
import math
import pickle
import struct
import types
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.boxes import Shape
from megatron_router_upcycling.checkpoint.format.files import FileRange, read_exactly
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.errors import error_as, reason

LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
CENTRAL_HEADER = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
VERSION_NEEDED = 20
ZIP32_LIMIT = 1 << 31  # values of as many bytes need fields that ``wrap_values`` does not write
PICKLE = "data.pkl"
END_MAGIC = b"PK\x05\x06"
BLOCK_BYTES = 2 << 20  # stays in the processor's cache between its checksum and its use
FLAGS = 0x808  # zip flags that a record may have: its sizes follow it as well, its name is UTF-8

# The torch class by which a tensor's pickle names its dtype -> the dtype.
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Damaged(Exception):
    """Not a whole ``torch.save`` file of one tensor or object; the message says why."""


class Values(NamedTuple):
    """Where a record or a tensor's values lie in a file, and their CRC-32."""

    offset: int
    length: int
    checksum: int


class PickledTensor(NamedTuple):
    """A pickled tensor: a view of a storage, whose values are another record of the file."""

    dtype: torch.dtype
    record: str  # the name of the values' record, after the file's prefix
    first: int  # element of the storage
    sizes: Shape
    stride: Shape
    num_stored: int  # elements of the storage

    @property
    def row_major(self) -> bool:
        """Whether its values lie row after row."""
        return torch.empty_strided(self.sizes, self.stride, device="meta").is_contiguous()


class TorchSaveFile:
    """A file that ``torch.save`` wrote, open for reading; a damaged one raises exceptions of any kind."""

    def __init__(self, content: BinaryIO) -> None:
        self.archive = zipfile.ZipFile(content)
        infos = self.archive.infolist()
        (name,) = [info.filename for info in infos if info.filename.endswith(PICKLE)]
        self.prefix = name.removesuffix(PICKLE)
        if min(info.header_offset for info in infos) != 0:
            raise ValueError("does not begin as a torch.save file")
        self.records: dict[str, Values] = {}
        for info in infos:
            packed = info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
            if packed or info.flag_bits & ~FLAGS:
                raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save never does")
            content.seek(info.header_offset)
            *_, name_length, extra_length = LOCAL_HEADER.unpack(content.read(LOCAL_HEADER.size))
            begin = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
            if begin + info.file_size > self.archive.start_dir:
                raise ValueError(f"{info.filename} does not lie within the file")
            self.records[info.filename] = Values(begin, info.file_size, info.CRC)
        if len(self.records) < len(infos):
            raise ValueError("two records of one name")
        order = f"{self.prefix}byteorder"
        if order in self.records and self.read(order) != b"little":
            raise ValueError("its values are not in little-endian order")

    def read(self, name: str) -> bytes:
        """A record's content, checked against its CRC-32."""
        return self.archive.read(name)

    def pickle(self) -> bytes:
        return self.read(self.prefix + PICKLE)


def pickled_tensor(value: Any) -> PickledTensor | None:
    """The tensor that ``safe_pickle`` read as ``value``, else None. A malformed one raises any exception."""
    if type(value).__name__ != "_rebuild_tensor_v2":
        return None
    storage, first, sizes, stride, *_ = value.args
    _, kind, key, _, num_stored = storage.args[0]
    dtype = STORAGES.get(kind.__name__)
    return dtype and PickledTensor(dtype, f"data/{key}", first, tuple(sizes), tuple(stride), num_stored)


class Contents(NamedTuple):
    """What a ``torch.save`` file holds."""

    identity: bytes  # a digest of the names, sizes and CRC-32 of all records, so of all content
    values: Values | None  # of the one tensor, all of its storage, row after row; None for anything else


def examine(folder: Path, blob: Blob, promised: tuple[Shape, torch.dtype] | None = None) -> Contents:
    """Read and check all of the ``torch.save`` file at ``blob`` but the values of a plain tensor.

    Raises ``Damaged``, also where a plain tensor does not have the ``promised`` sizes and dtype.
    """
    try:
        with open(folder / blob.file, "rb", buffering=0) as file:
            return _examine(io.BufferedReader(FileRange(file, blob)), blob, promised)
    except Exception as error:  # zipfile and pickle fail in many ways on damaged bytes
        raise Damaged(reason(error)) from None


def _examine(content: BinaryIO, blob: Blob, promised: tuple[Shape, torch.dtype] | None) -> Contents:
    content.seek(max(0, blob.length - END.size))
    end = content.read(END.size)
    if len(end) < END.size or end[:4] != END_MAGIC or end[-2:] != b"\0\0":
        raise ValueError("does not end as a torch.save file")
    file = TorchSaveFile(content)
    content.seek(0)
    reader = torch._C.PyTorchFileReader(content)  # stricter than Python's zip module
    if sorted(file.prefix + name for name in reader.get_all_records()) != sorted(file.records):
        raise ValueError("PyTorch finds other records in it than Python does")
    tensor = pickled_tensor(safe_pickle.loads(file.pickle(), "its pickle"))
    # All of its storage, row after row?
    plain = tensor and tensor.first == 0 and tensor.num_stored == math.prod(tensor.sizes) and tensor.row_major
    of_values = file.prefix + tensor.record if tensor and plain else None
    for name in file.records:
        # Reading checks the CRC-32.
        if name != of_values and reader.get_record(name.removeprefix(file.prefix)) != file.read(name):
            raise ValueError(f"PyTorch reads another {name} than Python does")
    records = sorted((name, record.length, record.checksum) for name, record in file.records.items())
    identity = hashlib.sha256(repr(records).encode()).digest()
    if tensor is None or of_values is None:
        return Contents(identity, None)
    values = file.records[of_values]
    if values.length != math.prod(tensor.sizes) * tensor.dtype.itemsize:
        raise ValueError(f"{values.length} bytes of values for {tensor.dtype} {list(tensor.sizes)}")
    file.archive.open(of_values).close()  # compares the header before the values, as reading does
    if values.offset != reader.get_record_offset(tensor.record):
        raise ValueError("PyTorch finds its values elsewhere than Python does")
    if promised not in (None, (tensor.sizes, tensor.dtype)):
        raise ValueError(f"holds {tensor.dtype} {list(tensor.sizes)}")
    return Contents(identity, values._replace(offset=blob.offset + values.offset))


def read_values(path: Path, values: Values, lengths: Sequence[int] = ()) -> Iterator[memoryview]:
    """A tensor's bytes in pieces of ``lengths``, all in one buffer: each piece overwrites the previous one.

    Raises ``Damaged`` where they cannot be read or, after the last piece, do not match their checksum.
    """
    whole, rest = divmod(values.length, BLOCK_BYTES)
    lengths = lengths or (*[BLOCK_BYTES] * whole, *[rest] * bool(rest))
    buffer, checksum = bytearray(max(lengths, default=0)), 0
    try:
        with open(path, "rb") as file:
            file.seek(values.offset)
            for length in lengths:
                view = memoryview(buffer)[:length]
                read_exactly(file, view)
                checksum = zlib.crc32(view, checksum)
                yield view
    except (OSError, EOFError) as error:
        raise Damaged(f"cannot be read ({reason(error)})") from None
    if checksum != values.checksum:
        raise Damaged("is not what was saved (checksum)")


def load(content: bytes, source: Any) -> Any:
    """The object in the bytes of a ``torch.save`` file; tensors within are inert records."""
    with error_as(Exception, f"{source}: damaged or half-written"):  # not a zip file, or a damaged one
        pickled = TorchSaveFile(io.BytesIO(content)).pickle()
    return safe_pickle.loads(pickled, source)


def dump(value: Any) -> bytes:
    """``value`` as a ``torch.save`` file; see ``safe_pickle.dumps``."""
    buffer = io.BytesIO()
    pickler = types.SimpleNamespace(__name__="pickle", Pickler=safe_pickle.Pickler)
    torch.save(value, buffer, pickle_module=pickler)
    return buffer.getvalue()


def wrap_values(values: Values, sizes: Shape, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes before and after the values in a ``torch.save`` file of a tensor of shape ``sizes``."""
    assert values.length < ZIP32_LIMIT
    small = ((PICKLE, _pickle_tensor(sizes, dtype)), ("byteorder", b"little"), ("version", b"3\n"))
    records = [(name, content, len(content), zlib.crc32(content)) for name, content in small]
    records.append(("data/0", b"", values.length, values.checksum))
    head, central = bytearray(), bytearray()
    for name, content, length, checksum in records:
        encoded = f"archive/{name}".encode()
        fields = (VERSION_NEEDED, 0, 0, 0, 0, checksum, length, length, len(encoded), 0)
        central += CENTRAL_HEADER.pack(0x02014B50, VERSION_NEEDED, *fields, 0, 0, 0, 0, len(head)) + encoded
        head += LOCAL_HEADER.pack(0x04034B50, *fields) + encoded + content
    counts = len(records), len(records), len(central), len(head) + values.length
    return bytes(head), bytes(central + END.pack(0x06054B50, 0, 0, *counts, 0))


class _TensorPickler(pickle.Pickler):
    """Pickles a tensor as ``torch.save`` does: its storage is named, not written."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
        return ("storage", getattr(torch, kind), "0", "cpu", value._size())


@functools.cache
def _pickle_tensor(sizes: Shape, dtype: torch.dtype) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(torch.empty(sizes, dtype=dtype))  # its memory is never touched
    return buffer.getvalue()
