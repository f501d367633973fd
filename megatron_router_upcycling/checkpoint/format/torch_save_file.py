"""``torch.save`` files of one tensor, taken apart and put together without moving its values.

Such a file is an uncompressed zip archive: a pickle that gives dtype and shape, a few small records, and
the values as they lie in memory. Giving a tensor another shape changes the pickle alone; the values can be
copied from file to file by the kernel, with the checksum that stands beside them.
"""

import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle

LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
CENTRAL_HEADER = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
DESCRIPTOR_SIZES = (0, 16, 24)  # checksum and sizes once more, after a record's content
VERSION_NEEDED = 20
ZIP32_LIMIT = 1 << 31  # values of as many bytes need fields that ``wrap_values`` does not write

# The classes of torch that a tensor's pickle names its dtype by.
STORAGES = {"BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "HalfStorage": torch.float16}


@dataclass(frozen=True)
class Values:
    """Where a tensor's values lie in a file, row after row, and their CRC-32."""

    offset: int
    length: int
    checksum: int


def find_values(content: BinaryIO, sizes: tuple[int, ...], dtype: torch.dtype) -> Values | None:
    """The values in a ``torch.save`` file of one tensor, or None where they are not plain.

    Plain: row after row, all of the tensor's storage, of the sizes and dtype expected. ``Values.offset``
    counts from the beginning of ``content``.

    Raises:
        Exception: of any kind, on a damaged file.
    """
    with zipfile.ZipFile(content) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed, which torch.save never does")
        (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        tensor = safe_pickle.loads(archive.read(pickled), "its pickle")
        if type(tensor).__name__ != "_rebuild_tensor_v2":
            return None
        storage, first, size, stride, *_ = tensor.args
        _, kind, key, _, count = storage.args[0]
        if first or count != math.prod(sizes) or tuple(size) != sizes or not is_row_major(sizes, stride):
            return None
        record = archive.getinfo(pickled.removesuffix("data.pkl") + f"data/{key}")
        if record.file_size != count * dtype.itemsize or STORAGES.get(kind.__name__) != dtype:
            return None
        archive.open(record).close()  # checks the header before the values
        following = [other.header_offset for other in records if other.header_offset > record.header_offset]
        end = min(following, default=archive.start_dir)
    content.seek(record.header_offset)
    *_, name_length, extra_length = LOCAL_HEADER.unpack(content.read(LOCAL_HEADER.size))
    begin = record.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if end - begin - record.file_size not in DESCRIPTOR_SIZES:
        raise ValueError("its values do not end where the next record begins")
    return Values(begin, record.file_size, record.CRC)


def is_row_major(sizes: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether values of these strides lie row after row. The stride of an axis of size 1 means nothing."""
    steps = (math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    return all(size == 1 or step == own for size, step, own in zip(sizes, steps, stride, strict=True))


def wrap_values(values: Values, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What stands before and after the values in a ``torch.save`` file that gives them ``sizes``."""
    assert values.length < ZIP32_LIMIT
    small = (("data.pkl", _pickle(sizes, dtype)), ("byteorder", b"little"), ("version", b"3\n"))
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
def _pickle(sizes: tuple[int, ...], dtype: torch.dtype) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(torch.empty(sizes, dtype=dtype))  # its memory is never touched
    return buffer.getvalue()
