"""A ``torch.save`` file examined: is it what PyTorch would read, and what does it claim to hold?

``torch_save_file`` finds values fast and takes a file's word for it. Here nothing is taken for granted but
the values themselves, whose checksum the caller takes as it reads them: every other record is read and
checked, and the file ends where its place in the data file ends.
"""

import hashlib
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import torch

from megatron_router_upcycling.checkpoint.format.torch_save_file import (
    END,
    STORAGES,
    TorchSaveFile,
    Values,
    pickled_tensor,
)

END_MAGIC = b"PK\x05\x06"
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
        return _examine(TorchSaveFile(content))
    except Damaged:
        raise
    except Exception as error:  # zipfile and pickle fail in many ways on damaged bytes
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


def identity(infos: Iterable[zipfile.ZipInfo]) -> bytes:
    """A digest of the names, sizes and CRC-32 of all records."""
    records = sorted((info.filename, info.file_size, info.CRC) for info in infos)
    return hashlib.sha256(repr(records).encode()).digest()


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
    dtype = DTYPES.get(tensor.storage) if tensor and tensor.is_whole else None
    values = file.prefix + tensor.record if tensor and dtype else None
    for info in file.infos:
        if info.filename != values:
            name = info.filename.removeprefix(file.prefix)
            if reader.get_record(name) != file.read(info):  # which checks the CRC-32
                raise Damaged(f"PyTorch reads another {name} than Python does")
    if tensor is None or dtype is None:
        return Contents(identity(file.infos))
    info = file.records[file.prefix + tensor.record]
    if info.file_size != math.prod(tensor.sizes) * dtype.itemsize:
        raise Damaged(f"{info.file_size} bytes of values where {dtype} {list(tensor.sizes)} is claimed")
    file.check_header(info)
    begin = reader.get_record_offset(tensor.record)
    found = Values(begin, info.file_size, info.CRC)
    return Contents(identity(file.infos), found, tensor.sizes, dtype)
