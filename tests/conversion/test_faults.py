"""Conversions that are killed, starved, raced or given a source that changes: nothing is ever half there.

The kill points are real: a forked process ends itself by SIGKILL at its N-th change of the disk, writes and
copies being cut in the middle: for every N of a new conversion, for some of the others and their last.
"""

import builtins
import errno
import fcntl
import gc
import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.conversion import convert
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from tests import dense_checkpoint
from tests.dense_checkpoint import make_stats

# What changes a disk, by its name in os. A file object's writes are counted as well.
CHANGES = ("write", "copy_file_range", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir")
REMOVALS = ("unlink", "rmdir")

Log = list[tuple[str, str]]  # what was done, to which file


class Changes:
    """Counts this process's changes of the disk. At number ``last`` it is killed, or that change fails."""

    def __init__(self, last: int | None) -> None:
        self.last, self.error = last, 0
        self.count = 0
        self.log: Log = []
        self._lock = threading.Lock()

    def fail(self, last: int, error: int) -> None:
        """Count from here; change ``last`` fails with ``error``."""
        self.last, self.error, self.count, self.log = last, error, 0, []

    def happens(self, name: str, path: str, half: Callable[[], object] = lambda: None) -> None:
        """Called before each change; ``half`` does the first half of it."""
        with self._lock:
            self.log.append((name, path))
            self.count += 1
            if self.count - 1 != self.last:
                return
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            half()
            os.kill(os.getpid(), signal.SIGKILL)

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


def forked(work: Callable[[Changes], object], last: int | None = None) -> tuple[int, Any]:
    """Do ``work`` in a forked process that is killed at change ``last``.

    Returns:
        Its exit code (negative: the signal that ended it) and what ``work`` returned.
    """
    reader, writer = os.pipe()
    pid = start(work, last, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, pickle.loads(answer) if answer else None


def start(work: Callable[[Changes], object], last: int | None = None, answer: int = -1) -> int:
    """Start ``work`` in a forked process, which writes its result to the descriptor ``answer``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's threads do nothing
        gc.freeze()  # so that collecting garbage there does not copy all memory
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        changes, write = Changes(last), os.write
        changes.watch()
        result = work(changes)
        if answer >= 0:
            write(answer, pickle.dumps(result))
        status = 0
    except UserError as error:
        status = 2
        if answer >= 0:
            write(answer, pickle.dumps(str(error)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


class Workshop:
    """A dense checkpoint, its key statistics, and the conversions of this test."""

    def __init__(self, folder: Path, tensor_parallel: int = 2) -> None:
        self.folder, self.dense, self.out = folder, folder / "dense", folder / "moe"
        dense_checkpoint.write(self.dense, tensor_parallel=tensor_parallel)
        make_stats(folder / "ks")
        self.before = stamps(self.dense)

    def convert(
        self, progress: Callable[[int], None] = lambda count: None, num_experts: int = 4, **options: Any
    ) -> None:
        router = RouterConfig(num_experts=num_experts)
        if options.pop("several", False):
            options |= {"experts": (self.dense, self.dense), "average_rest": True}
        ready = convert.prepare(self.dense, self.out, Options(router, (self.folder / "ks",), **options))
        convert.convert(ready, progress)

    def changes(self, **options: Any) -> Log:
        """The changes that a conversion makes, by making it."""
        status, log = forked(lambda changes: self.convert(**options) or changes.log)
        assert status == 0
        return log

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
    "of several models": ({"several": True}, False, ()),
    "new without links": ({"materialize": True}, False, ("link",)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_killed_at_every_change_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shop = Workshop(tmp_path, tensor_parallel=1)
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
    log = shop.changes(**options)
    new = shop.result()
    seen: set[str] = set()
    # The others write what "new" does, or more of the same, until they publish it.
    step = {"new": 1, "of several models": 9}.get(name, 3)
    for last in sorted({*range(0, len(log), step), *range(len(log) - 15, len(log))}):
        if shop.out.exists():
            shutil.rmtree(shop.out)
        if exists:
            shutil.copytree(shop.folder / "ks.old", shop.out, copy_function=os.link)
        status, _ = forked(lambda changes: shop.convert(**options), last)
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
    log = shop.changes()
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
    for folder in (partial, f"{partial}/release"):
        flushed = max(place for place, entry in enumerate(log[:published]) if entry == ("fsync", folder))
        named = ("create", "replace", "link")
        entries = [
            place
            for place, (name, path) in enumerate(log)
            if name in named and os.path.dirname(path) == folder
        ]
        assert len(entries) > 2 and flushed > max(entries)
    assert ("fsync", str(shop.folder)) in log[published:]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full disk", "broken disk"])
def test_every_change_that_fails(shop: Workshop, error: int) -> None:
    """One line and nothing left; or, where the last flush fails, the whole result."""
    log = shop.changes()
    new = shop.result()
    shutil.rmtree(shop.out)

    def run_all(changes: Changes) -> int:
        failures = 0
        for last, (name, path) in enumerate(log):
            if name in REMOVALS or path == str(shop.folder):  # which is there already
                continue
            changes.fail(last, error)
            said = ""
            try:
                shop.convert()
            except UserError as refused:
                said = str(refused)
            changes.fail(-1, 0)
            found = shop.result()
            assert shop.listing() == ["dense", "ks"] + ["moe"] * (found is not None), (name, path)
            if path.endswith(".lock"):
                assert not said and found == new  # it is held, though its file does not say by whom
            else:
                assert os.strerror(error) in said and "\n" not in said, (name, path)
                assert found is None, (name, path)
                failures += 1
            if found:
                shutil.rmtree(shop.out)
        return failures

    status, failures = forked(run_all)
    assert status == 0 and failures > 40
    assert stamps(shop.dense) == shop.before


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file, as a saving program does."""
    partial = path.with_name("rewritten")
    partial.write_bytes(content)
    partial.rename(path)


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        work()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_one_flipped_bit_of_the_values(shop: Workshop) -> None:
    """In every chunk of every tensor, at its first, last and some byte between."""
    checkpoint = open_checkpoint(shop.dense)
    count = 0
    for key, stored in checkpoint.tensors.items():
        for place, chunk in enumerate(stored.chunks):
            values = checkpoint.find_values(chunk, stored.dtype)
            assert values is not None
            path = checkpoint.iteration_dir / chunk.blob.file
            content = bytearray(path.read_bytes())
            offset = values.offset + (0, values.length // 2, values.length - 1)[place % 3]
            content[offset] ^= 1 << place % 8
            whole = path.read_bytes()
            rewrite(path, bytes(content))
            said = refused(shop.convert)
            assert key in said and "is not what was saved (checksum)" in said
            assert shop.listing() == ["dense", "ks"]
            rewrite(path, whole)
            count += 1
    assert count > 40
    shop.convert()


def test_values_that_are_not_numbers(shop: Workshop) -> None:
    values = dense_checkpoint.tensors()
    for number, key in (
        (torch.nan, "output_layer.weight"),
        (-torch.inf, f"{dense_checkpoint.MLP}.linear_fc2.weight"),
    ):
        changed = {name: value.clone() for name, value in values.items()}
        changed[key].view(-1)[-1] = number
        shutil.rmtree(shop.dense)
        dense_checkpoint.write(shop.dense, changed)
        assert f"{key} at [" in (said := refused(shop.convert)) and "holds NaN or infinity" in said
        assert shop.listing() == ["dense", "ks"]


def flip_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


SPOILS: dict[str, Callable[[Path], object]] = {
    "written in place": flip_in_place,
    "replaced by its like": lambda path: rewrite(path, path.read_bytes()),
    "touched": lambda path: os.utime(path),
    "longer": lambda path: path.open("ab").write(b"more"),
    "shorter": lambda path: os.truncate(path, path.stat().st_size // 2),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("file", ["dense/iter_0000008/.metadata", "dense/iter_0000008/__1_0.distcp", "ks"])
@pytest.mark.parametrize("when", [0, 5])
def test_source_that_changes_while_it_is_read(shop: Workshop, file: str, how: str, when: int) -> None:
    count = iter(range(1000))

    def progress(written: int) -> None:
        if next(count) == when:
            SPOILS[how](shop.folder / file)

    said = refused(lambda: shop.convert(progress))
    assert Path(file).name in said
    assert set(shop.listing()) <= {"dense", "ks"}


@pytest.mark.parametrize(
    "name", ["two words", "Übergröße – 模型", "a\nb", 'quote\'s "$HOME" *', "-f", "x.partial-1"]
)
def test_names_of_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    shop = Workshop(tmp_path / name)
    shop.out = tmp_path / name / name
    shop.convert()
    shop.convert(overwrite=True, num_experts=2)
    assert open_checkpoint(shop.out).args.num_experts == 2
    assert shop.listing() == sorted(["dense", "ks", name])
    assert "exists" in refused(shop.convert)


@pytest.fixture
def read_only(disk: Path) -> Path:
    """A file system that nothing can be written to, with a dense checkpoint."""
    dense_checkpoint.write(disk / "dense")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    return disk


def test_read_only_target_and_read_only_source(shop: Workshop, read_only: Path) -> None:
    shop.out = read_only / "new/moe"
    assert "cannot be written (Read-only file system)" in refused(shop.convert)
    shop.dense, shop.out = read_only / "dense", shop.folder / "moe"
    shop.convert()
    open_checkpoint(shop.out)


def test_second_converter_is_told_who_the_first_is(shop: Workshop) -> None:
    def wait_in_the_middle(changes: Changes) -> None:
        with publish.new_folder(shop.out, overwrite=False):
            signal.pause()

    pid = start(wait_in_the_middle)
    try:
        deadline = time.monotonic() + 30
        while not list(shop.folder.glob(".moe.partial-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        said = refused(shop.convert)
        assert f"being made by process {pid} on {socket.gethostname()}" in said
        assert shop.listing() == [".moe.lock", f".moe.partial-{pid}-{socket.gethostname()}", "dense", "ks"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shop.convert()  # the lock went with its holder
    assert shop.listing() == ["dense", "ks", "moe"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_four_at_once(shop: Workshop, overwrite: bool) -> None:
    shop.convert()
    whole = shop.result()
    if not overwrite:
        shutil.rmtree(shop.out)
    pids = [start(lambda changes: shop.convert(overwrite=overwrite)) for _ in range(4)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert set(codes) <= {0, 2} and codes.count(0) >= 1 and (overwrite or codes.count(0) == 1)
    assert shop.result() == whole
    assert shop.listing() == ["dense", "ks", "moe"]


def test_file_system_without_locks(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    own, others = f".moe.partial-1-{socket.gethostname()}", ".moe.partial-1-another"
    for name in (own, others):
        (shop.folder / name).mkdir()
    shop.convert()
    assert shop.listing() == sorted([own, others, "dense", "ks", "moe"])
    monkeypatch.undo()  # with locks, nobody else of this machine works there
    shop.convert(overwrite=True)
    assert shop.listing() == [others, "dense", "ks", "moe"]
