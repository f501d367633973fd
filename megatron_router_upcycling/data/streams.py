"""Files, compressed or not, as streams of bytes; what is wrong with one is said with its name."""

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_router_upcycling.data.sources import Source
from megatron_router_upcycling.errors import UserError, reason

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF_16 = "is UTF-16; convert it to UTF-8, as with iconv -f UTF-16 -t UTF-8"


class Stream:
    """The bytes of a file, decompressed, and how many of the file's own were taken for them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        with blamed(source.path):
            self._raw = open(source.path, "rb")  # noqa: SIM115 (closed in __exit__)
            self._stream = _decompressed(self._raw, source)
        self._reported = 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, or all that are left.

        Raises:
            UserError: the file is damaged, or ends before its compressed stream does.
        """
        blocks, left = [], count
        with blamed(self._source.path):
            while left and (block := self._stream.read(left)):
                blocks.append(block)
                left -= len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def first(self, count: int) -> bytes:
        """As ``read``, at the beginning of a file of JSON: without its byte-order mark.

        Raises:
            UserError: also where it is UTF-16.
        """
        block = self.read(count)
        if block.startswith(UTF_16_MARKS):
            raise UserError(f"SOURCE {self._source.path}: {UTF_16}")
        return block.removeprefix(BYTE_ORDER_MARK)

    def advance(self) -> int:
        """Bytes of the file on the disk that were read since this was last asked."""
        place = self._raw.tell()
        moved, self._reported = place - self._reported, place
        return moved


def _decompressed(raw: Any, source: Source) -> Any:
    if source.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == ".bz2":
        return bz2.BZ2File(raw)
    if source.compression == ".xz":
        return lzma.LZMAFile(raw)
    if source.compression == ".zst":
        return pyarrow(source.path).CompressedInputStream(raw, "zstd")
    return raw


def pyarrow(path: Path, module: str = "pyarrow") -> Any:
    """The library that reads Parquet, Arrow and Zstandard.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"SOURCE {path}: reading it needs pyarrow; pip install pyarrow") from None


@contextlib.contextmanager
def blamed(path: Path) -> Iterator[None]:
    """What goes wrong within is the fault of the file ``path``.

    Raises:
        UserError: instead of what reading a file, or decompressing it, raises.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, NotImplementedError, lzma.LZMAError, zlib.error) as error:
        what = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"SOURCE {path}: cannot be read, or is cut short or damaged ({what})") from None
