"""Files that must stay as they are while they are read."""

from collections.abc import Iterable
from pathlib import Path

from megatron_router_upcycling.errors import UserError, reason

Stamp = tuple[int, int, int]  # inode, size, time of the last write in nanoseconds


class Stamps:
    """What ``paths`` were like when this was made.

    A write changes a file's time, a replacement its inode. Linking or reading a file changes neither.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths if path.is_file()}

    def check(self) -> None:
        """Refuse a file that was written, replaced or removed since."""
        for path, stamp in self._stamps.items():
            if not path.is_file() or _stamp(path) != stamp:
                raise UserError(
                    f"{path}: changed while it was read; wait until whatever writes there is done,"
                    " then run the command again"
                )


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
