"""Files that ``torch.save`` wrote: read here and nowhere else, taken apart without moving a tensor's values.

Such a file is an uncompressed zip archive: a pickle of the object, a few small records, and the values of
each storage as they lie in memory, with a CRC-32. Giving a tensor another shape changes the pickle alone;
the values can be copied from file to file by the kernel, with the checksum that stands beside them.
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.errors import UserError, reason

LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
CENTRAL_HEADER = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
DESCRIPTOR_SIZES = (0, 16, 24)  # checksum and sizes once more, after a record's content
VERSION_NEEDED = 20
ZIP32_LIMIT = 1 << 31  # values of as many bytes need fields that ``wrap_values`` does not write
PICKLE = "data.pkl"
END_MAGIC = b"PK\x05\x06"
FLAGS = 0x808  # of a record: its sizes follow it as well, its name is UTF-8

# The classes of torch that a tensor's pickle names its dtype by: those of a model's parameters, and others.
STORAGES = {"BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "HalfStorage": torch.float16}
OTHER_STORAGES = {
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Values:
    """Where a tensor's values lie in a file, row after row, and their CRC-32."""

    offset: int
    length: int
    checksum: int


class PickledTensor(NamedTuple):
    """A tensor as a pickle has it: a view of a storage, whose values are a record beside the pickle."""

    storage: str  # the class of torch that gives the dtype, one of ``STORAGES``
    record: str  # the name of the values' record, after the file's prefix
    first: int  # element of the storage
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    num_stored: int  # elements of the storage

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its storage, row after row."""
        whole = self.first == 0 and self.num_stored == math.prod(self.sizes)
        return whole and is_row_major(self.sizes, self.stride)


class TorchSaveFile:
    """A file that ``torch.save`` wrote, open for reading.

    Its pickle passes the allow-list of ``safe_pickle``. Records are by the names that the zip archive has for
    them: ``prefix`` and ``data.pkl``, ``byteorder``, ``data/0`` and so on. No record is compressed, so that
    none is larger than the file.

    Raises:
        Exception: of any kind on a damaged file, here and in all methods.
    """

    def __init__(self, content: BinaryIO) -> None:
        self.content = content
        self._archive = zipfile.ZipFile(content)
        self.infos = self._archive.infolist()
        for info in self.infos:
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, which torch.save never does")
        self.records = {info.filename: info for info in self.infos}
        (name,) = [info.filename for info in self.infos if info.filename.endswith(PICKLE)]
        self.prefix = name.removesuffix(PICKLE)

    @property
    def end(self) -> int:
        """Where the records end and the archive's directory begins."""
        return self._archive.start_dir

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """A record's content, checked against its CRC-32."""
        return self._archive.read(info)

    def pickle(self) -> bytes:
        return self.read(self.records[self.prefix + PICKLE])

    def load(self, source: Any) -> Any:
        """The object in the file; tensors within come as inert records."""
        return safe_pickle.loads(self.pickle(), source)

    def check_byte_order(self) -> None:
        info = self.records.get(f"{self.prefix}byteorder")
        if info and (order := self.read(info)) != b"little":
            raise ValueError(f"its values are not in little-endian order ({order!r})")

    def check_header(self, info: zipfile.ZipInfo) -> None:
        """Whether what stands before a record's content is what the archive's directory says."""
        self._archive.open(info).close()

    def values(self, info: zipfile.ZipInfo) -> Values:
        """Where a record's content lies."""
        self.check_header(info)
        begin = record_start(self.content, info)
        following = (other.header_offset for other in self.infos if other.header_offset > info.header_offset)
        if min(following, default=self.end) - begin - info.file_size not in DESCRIPTOR_SIZES:
            raise ValueError("its values do not end where the next record begins")
        return Values(begin, info.file_size, info.CRC)


def record_start(content: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a record's content: its local header is of any length."""
    content.seek(info.header_offset)
    *_, name_length, extra_length = LOCAL_HEADER.unpack(content.read(LOCAL_HEADER.size))
    return info.header_offset + LOCAL_HEADER.size + name_length + extra_length


def pickled_tensor(value: Any) -> PickledTensor | None:
    """A tensor among what ``safe_pickle`` read; None for anything else, a ``Parameter`` too.

    Raises:
        Exception: of any kind, where a pickle only looks like a tensor's.
    """
    if type(value).__name__ != "_rebuild_tensor_v2":
        return None
    storage, first, sizes, stride, *_ = value.args
    _, kind, key, _, num_stored = storage.args[0]
    return PickledTensor(kind.__name__, f"data/{key}", first, tuple(sizes), tuple(stride), num_stored)


def find_values(content: BinaryIO, sizes: tuple[int, ...], dtype: torch.dtype) -> Values | None:
    """The values in a ``torch.save`` file of one tensor, or None where they are not plain.

    Plain: row after row, all of the tensor's storage, of the sizes and dtype expected. ``Values.offset``
    counts from the beginning of ``content``.

    Raises:
        Exception: of any kind, on a damaged file.
    """
    file = TorchSaveFile(content)
    tensor = pickled_tensor(file.load("its pickle"))
    if tensor is None or tensor.sizes != sizes or not tensor.is_whole:
        return None
    info = file.records[file.prefix + tensor.record]
    if info.file_size != tensor.num_stored * dtype.itemsize or STORAGES.get(tensor.storage) != dtype:
        return None
    return file.values(info)


class Damaged(Exception):
    """Not a whole ``torch.save`` file of one tensor or object; the message says why."""


@dataclass(frozen=True)
class Contents:
    """What a ``torch.save`` file holds.

    ``identity`` is a digest of the names, sizes and CRC-32 of all records, so of all content. ``values``,
    ``sizes`` and ``dtype`` are those of the one tensor whose values lie row after row; None for others.
    """

    identity: bytes
    values: Values | None = None
    sizes: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def examine(content: BinaryIO, length: int) -> Contents:
    """Read all of a ``torch.save`` file of ``length`` bytes but the values of a plain tensor.

    ``find_values`` takes a file's word for what it holds. Here nothing is taken for granted but the values
    themselves, whose checksum the caller takes as it reads them: every other record is read and checked, and
    the file ends where its place in the data file ends.

    Raises:
        Damaged: it does not end where it should, a record is not what its checksum says, ...
    """
    try:
        content.seek(length - END.size)
        end = content.read(END.size)
        if len(end) < END.size or end[:4] != END_MAGIC or end[-2:] != b"\0\0":
            raise Damaged("does not end as a torch.save file")
        return _examine(TorchSaveFile(content))
    except Damaged:
        raise
    except Exception as error:  # zipfile and pickle fail in many ways on damaged bytes
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


def _examine(file: TorchSaveFile) -> Contents:
    if min(info.header_offset for info in file.infos) != 0:
        raise Damaged("does not begin as a torch.save file")
    if len(file.records) < len(file.infos):
        raise Damaged("two records of one name")
    for info in file.infos:
        if info.compress_size != info.file_size:
            raise Damaged(f"record {info.filename} is compressed")
        if info.flag_bits & ~FLAGS:
            raise Damaged(f"record {info.filename} is encrypted")
    file.content.seek(0)
    reader = torch._C.PyTorchFileReader(file.content)  # Python's zip module forgives what this does not
    if sorted(file.prefix + name for name in reader.get_all_records()) != sorted(file.records):
        raise Damaged("PyTorch finds other records in it than Python does")
    file.check_byte_order()
    tensor = pickled_tensor(file.load("its pickle"))
    dtype = (STORAGES | OTHER_STORAGES).get(tensor.storage) if tensor and tensor.is_whole else None
    values = file.prefix + tensor.record if tensor and dtype else None
    for info in file.infos:
        if info.filename != values:
            name = info.filename.removeprefix(file.prefix)
            if reader.get_record(name) != file.read(info):  # which checks the CRC-32
                raise Damaged(f"PyTorch reads another {name} than Python does")
    records = sorted((info.filename, info.file_size, info.CRC) for info in file.infos)
    identity = hashlib.sha256(repr(records).encode()).digest()
    if tensor is None or dtype is None:
        return Contents(identity)
    info = file.records[file.prefix + tensor.record]
    if info.file_size != math.prod(tensor.sizes) * dtype.itemsize:
        raise Damaged(f"{info.file_size} bytes of values where {dtype} {list(tensor.sizes)} is claimed")
    file.check_header(info)
    begin = reader.get_record_offset(tensor.record)
    found = Values(begin, info.file_size, info.CRC)
    return Contents(identity, found, tensor.sizes, dtype)


def load(content: bytes, source: Any) -> Any:
    """The object in the bytes of a ``torch.save`` file; tensors within come as inert records."""
    try:
        pickled = TorchSaveFile(io.BytesIO(content)).pickle()
    except Exception as error:  # not a zip file, or a damaged one
        raise UserError(f"{source}: damaged or half-written ({reason(error)})") from None
    return safe_pickle.loads(pickled, source)


def dump(value: Any) -> bytes:
    """``value`` as a ``torch.save`` file, inert records under the names they stand for.

    Raises:
        pickle.PicklingError, RecursionError: as ``safe_pickle.dumps``.
    """
    buffer = io.BytesIO()
    pickler = types.SimpleNamespace(__name__="pickle", Pickler=safe_pickle.Pickler)
    torch.save(value, buffer, pickle_module=pickler)
    return buffer.getvalue()


def is_row_major(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether values of these strides lie row after row. The stride of an axis of size 1 means nothing."""
    steps = (math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    return all(size == 1 or step == own for size, step, own in zip(sizes, steps, stride, strict=True))


def wrap_values(values: Values, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What stands before and after the values in a ``torch.save`` file that gives them ``sizes``."""
    assert values.length < ZIP32_LIMIT
    small = ((PICKLE, _pickle_tensor(sizes, dtype)), ("byteorder", b"little"), ("version", b"3\n"))
    head, central = bytearray(), bytearray()
    for name, content in small:
        central += _central_header(name, zlib.crc32(content), len(content), len(head))
        head += _local_header(name, zlib.crc32(content), len(content)) + content
    central += _central_header("data/0", values.checksum, values.length, len(head))
    head += _local_header("data/0", values.checksum, values.length)
    count, begin = len(small) + 1, len(head) + values.length
    end = END.pack(0x06054B50, 0, 0, count, count, len(central), begin, 0)
    return bytes(head), bytes(central + end)


def _local_header(name: str, checksum: int, length: int) -> bytes:
    encoded = f"archive/{name}".encode()
    fields = (0x04034B50, VERSION_NEEDED, 0, 0, 0, 0, checksum, length, length, len(encoded), 0)
    return LOCAL_HEADER.pack(*fields) + encoded


def _central_header(name: str, checksum: int, length: int, offset: int) -> bytes:
    encoded = f"archive/{name}".encode()
    fields = (0x02014B50, VERSION_NEEDED, VERSION_NEEDED, 0, 0, 0, 0, checksum, length, length)
    return CENTRAL_HEADER.pack(*fields, len(encoded), 0, 0, 0, 0, 0, offset) + encoded


class _TensorPickler(pickle.Pickler):
    """Pickles a tensor as ``torch.save`` does: its storage is named, not written."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
        return ("storage", getattr(torch, kind), "0", "cpu", value._size())


@functools.cache
def _pickle_tensor(sizes: tuple[int, ...], dtype: torch.dtype) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(torch.empty(sizes, dtype=dtype))  # its memory is never touched
    return buffer.getvalue()
