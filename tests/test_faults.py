"""Conversions that are killed, starved, raced or given a source that changes: nothing is ever half there.

The kill points are real: a forked process ends itself by SIGKILL at its N-th change of the disk, for every
N, writes and copies being cut in the middle.
"""

import builtins
import ctypes
import io
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling import cli, conversion
from megatron_router_upcycling.checkpoint import publish
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.router_config import RouterConfig
from megatron_router_upcycling.upcycle import Options
from tests import dense_checkpoint
from tests.test_upcycle import make_stats

# What changes a disk, by its name in os. A file object's writes are counted as well.
CHANGES = ("write", "copy_file_range", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir")


class Changes:
    """Counts this process's changes of the disk, and ends it at one of them."""

    def __init__(self, last: int | None) -> None:
        self.last = last
        self.count = 0
        self.log: list[tuple[str, str]] = []  # what was done to which file
        self._lock = threading.Lock()

    def happens(self, name: str, path: str, half: Callable[[], object] = lambda: None) -> None:
        """Called before each change; ``half`` does the first half of it."""
        with self._lock:
            if self.count == self.last:
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            self.log.append((name, path))

    def watch(self) -> None:
        """Wrap what changes the disk. For a forked process: nothing is put back."""
        for name in CHANGES:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        publish.rename_exchange = self._wrapped("exchange", publish.rename_exchange)
        original = io.open

        def counted(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+") or isinstance(file, int):
                return original(file, mode, buffering, *rest, **options)
            binary = mode.replace("b", "").replace("t", "")
            raw = _CountedFile(file, binary, changes=self)
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, *rest, **options)

        builtins.open = io.open = counted  # type: ignore[assignment]

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            half: Callable[[], object] = lambda: None  # noqa: E731
            place = args[1] if name == "copy_file_range" else args[0]
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
            if name == "copy_file_range":
                source, target, count, offset = args
                half = lambda: function(source, target, count // 2, offset)  # noqa: E731
            self.happens(name, str(path), half)
            return function(*args, **options)

        return call


class _CountedFile(io.FileIO):
    def __init__(self, file: Any, mode: str, changes: Changes) -> None:
        changes.happens("create", str(file))
        super().__init__(file, mode)
        self.changes = changes

    def write(self, data: Any) -> int:
        def half() -> None:
            super(_CountedFile, self).write(bytes(data)[: len(data) // 2])

        self.changes.happens("write", str(self.name), half)
        return super().write(data)


def forked(work: Callable[[], object], last: int | None) -> tuple[int, list[tuple[str, str]]]:
    """Do ``work`` in a forked process that is killed at change ``last``.

    Returns:
        Its exit code (negative: the signal that ended it) and, where it was not killed, its changes.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's threads do nothing
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            torch.set_num_threads(1)
            changes = Changes(last)
            write = os.write
            changes.watch()
            work()
            write(writer, repr(changes.log).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        log = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), eval(log) if log else []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


class Workshop:
    """A dense checkpoint, its key statistics, and the conversions of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dense, self.out = folder, folder / "dense", folder / "moe"
        dense_checkpoint.write(self.dense, tensor_parallel=2)
        make_stats(folder / "ks")
        self.before = stamps(self.dense)

    def convert(self, **options: Any) -> None:
        router = RouterConfig(num_experts=options.pop("num_experts", 4))
        ready = conversion.prepare(self.dense, self.out, Options(router, self.folder / "ks", **options))
        conversion.convert(ready)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in ("dense", "ks"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def listing(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def result(self) -> dict[str, bytes] | None:
        """What is at OUT; as Megatron looks for it, by the file that names the iteration."""
        return contents(self.out) if self.out.exists() else None


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def no_exchange(first: Path, second: Path) -> bool:
    return False


def no_link(*_: object) -> None:
    raise OSError(18, "Invalid cross-device link")


# name -> (options, OUT is there before, what the file system cannot do)
CONVERSIONS: dict[str, tuple[dict[str, Any], bool, tuple[str, ...]]] = {
    "new": ({}, False, ()),
    "overwrite": ({"overwrite": True}, True, ()),
    "overwrite without exchange": ({"overwrite": True}, True, ("exchange",)),
    "new without links": ({"materialize": True}, False, ("link",)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_killed_at_every_change_of_the_disk(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, exists, lacks = CONVERSIONS[name]
    if "exchange" in lacks:
        monkeypatch.setattr(publish, "rename_exchange", no_exchange)
    if "link" in lacks:
        monkeypatch.setattr(os, "link", no_link)
    old: dict[str, bytes] | None = None
    if exists:
        shop.convert(num_experts=2)
        old = shop.result()
        shutil.copytree(shop.out, shop.folder / "ks.old", copy_function=os.link)
    status, log = forked(lambda: shop.convert(**options), None)
    assert status == 0
    new = shop.result()
    seen: set[str] = set()
    for last in range(len(log)):
        if shop.out.exists():
            shutil.rmtree(shop.out)
        if exists:
            shutil.copytree(shop.folder / "ks.old", shop.out, copy_function=os.link)
        status, _ = forked(lambda: shop.convert(**options), last)
        assert status == -signal.SIGKILL, log[last]
        found = shop.result()
        if found is None and "exchange" in lacks:
            found = contents(shop.folder / ".moe.replaced")  # the next run puts it back
            seen.add("put back")
        assert found in (old, new), log[last]
        seen.add("old" if found == old else "new")
        shop.convert(**options | {"overwrite": True})
        assert shop.result() == new
        assert shop.listing() == ["dense", "ks", *["ks.old"] * exists, "moe"], log[last]
    assert len(log) >= 50  # four times
    assert {"old", "new"} <= seen and ("put back" in seen) == ("exchange" in lacks)
    assert stamps(shop.dense) == shop.before


def test_everything_is_on_the_disk_before_the_name_appears(shop: Workshop) -> None:
    """A power cut after the last rename loses nothing: files and folders are flushed, and in that order."""
    status, log = forked(shop.convert, None)
    assert status == 0
    (published,) = (place for place, (name, path) in enumerate(log) if name == "rename")
    partial = log[published][1]
    written = [path for name, path in log if name in ("create", "write", "copy_file_range")]
    made = {path for path in written if path.startswith(f"{partial}/")}
    assert {Path(path).relative_to(partial).as_posix() for path in made} >= set(shop.result() or ()) - {
        "release/__0_0.distcp", "release/__1_0.distcp", "router_upcycling.json"  # links, and under its name
    }  # fmt: skip
    for path in made - {path for path in made if "/.router_upcycling" in path}:
        assert (last := max(place for place, entry in enumerate(log) if entry[1] == path)) < published
        assert log[last] == ("fsync", path)
    for folder, entry in ((partial, "router_upcycling.json"), (f"{partial}/release", ".metadata")):
        flushed = log.index(("fsync", folder))
        assert flushed < published and flushed > max(
            place
            for place, (name, path) in enumerate(log)
            if name == "create" and path == f"{folder}/{entry}" or path.startswith(f"{folder}/.{entry}")
        )
    assert ("fsync", str(shop.folder)) in log[published:]
