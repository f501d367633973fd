"""A ``torch.save`` file examined: is it what PyTorch would read, and what does it claim to hold?

``archive`` finds values fast and takes a file's word for it. Here nothing is taken for granted but the
values themselves, whose checksum the caller takes as it reads them: every other record is read and
checked, and the file ends where its place in the data file ends.
"""

import hashlib
import math
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.torch_save_file import END, STORAGES, Values, is_row_major

END_MAGIC = b"PK\x05\x06"
PICKLE = "data.pkl"
REBUILD = "_rebuild_tensor_v2"
BYTE_ORDER = b"little"
FLAGS = 0x808  # of a record: its sizes follow it as well, its name is UTF-8
# The classes of torch that a tensor's pickle names its dtype by.
DTYPES = STORAGES | {
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

    Raises:
        Damaged: it does not end where it should, a record is not what its checksum says, ...
    """
    try:
        content.seek(length - END.size)
        end = content.read(END.size)
        if len(end) < END.size or end[:4] != END_MAGIC or end[-2:] != b"\0\0":
            raise Damaged("does not end as a torch.save file")
        with zipfile.ZipFile(content) as archive:
            return _examine(archive, content)
    except Damaged:
        raise
    except Exception as error:  # zipfile and pickle fail in many ways on damaged bytes
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


def identity(archive: zipfile.ZipFile) -> bytes:
    """A digest of the names, sizes and CRC-32 of all records."""
    records = sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist())
    return hashlib.sha256(repr(records).encode()).digest()


def _examine(archive: zipfile.ZipFile, content: BinaryIO) -> Contents:
    infos = archive.infolist()
    if not infos or min(info.header_offset for info in infos) != 0:
        raise Damaged("does not begin as a torch.save file")
    if len({info.filename for info in infos}) < len(infos):
        raise Damaged("two records of one name")
    content.seek(0)
    reader = torch._C.PyTorchFileReader(content)  # Python's zip module forgives what this does not
    prefix = infos[0].filename.split("/")[0] + "/"
    if sorted(prefix + name for name in reader.get_all_records()) != sorted(i.filename for i in infos):
        raise Damaged("PyTorch finds other records in it than Python does")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Damaged(f"record {info.filename} is compressed")
        if info.flag_bits & ~FLAGS:
            raise Damaged(f"record {info.filename} is encrypted")
    plain = _plain_tensor(safe_pickle.loads(archive.read(prefix + PICKLE), "its pickle"))
    values_name = plain and f"{prefix}data/{plain[0]}"
    for info in infos:
        name = info.filename.removeprefix(prefix)
        if info.filename != values_name:
            held = archive.read(info)  # checks the CRC-32
            if reader.get_record(name) != held:
                raise Damaged(f"PyTorch reads another {name} than Python does")
            if name == "byteorder" and held != BYTE_ORDER:
                raise Damaged(f"byte order {held!r}")
    if plain is None:
        return Contents(identity(archive))
    key, sizes, dtype = plain
    info = archive.getinfo(str(values_name))
    if info.file_size != math.prod(sizes) * dtype.itemsize:
        raise Damaged(f"{info.file_size} bytes of values where {dtype} {list(sizes)} is claimed")
    archive.open(info).close()  # checks the header before the values
    begin = reader.get_record_offset(f"data/{key}")
    return Contents(identity(archive), Values(begin, info.file_size, info.CRC), sizes, dtype)


def _plain_tensor(tensor: Any) -> tuple[str, tuple[int, ...], torch.dtype] | None:
    """Key of the storage, sizes and dtype of a tensor that is all of its storage, row after row."""
    if type(tensor).__name__ != REBUILD:
        return None
    storage, first, size, stride, *_ = tensor.args
    _, kind, key, _, count = storage.args[0]
    sizes = tuple(size)
    dtype = DTYPES.get(kind.__name__)
    if first or count != math.prod(sizes) or not is_row_major(sizes, stride) or dtype is None:
        return None
    return key, sizes, dtype
