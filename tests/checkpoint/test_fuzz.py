"""Hundreds of damaged and hostile checkpoints, statistics, manifests and configurations.

Each may be refused, by one line, or taken; nothing else. No other exception, nothing executed, no file
touched, no hang, no memory asked for that the files do not hold.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import flags, manifest, yaml_files
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.diagnostics import checkpoint as inspection
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from tests import dense_checkpoint, legacy_checkpoint
from tests.dense_checkpoint import make_stats

SECONDS = 10.0  # that one case may take, on a machine with other work
MEMORY_MB = 300  # that all cases together may add to the process
HARMFUL = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
}  # fmt: skip


SEEN: list[str] | None = None  # harmful things done while a case is tried; None between cases


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if SEEN is not None and event in HARMFUL:
        SEEN.append(f"{event} {args}")


sys.addaudithook(_watch)


class TooSlow(BaseException):
    """A case took longer than it may."""


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


def refused(work: Callable[[], object]) -> str | None:
    """Do ``work``, which may take or refuse what it reads; the refusal's words, or None.

    Anything but a UserError of one line fails the test.
    """
    global SEEN
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    seen = SEEN = []
    try:
        work()
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 2000, repr(str(error))
        return str(error)
    finally:
        SEEN = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert not seen
    return None


@pytest.fixture(scope="module", autouse=True)
def no_memory_is_asked_for() -> Iterator[None]:
    """What a small file can make the process hold is small."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), hard))  # rather than harm the machine
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert added < MEMORY_MB


def mutated(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one of the things that happen to bytes."""
    data = bytearray(content)
    place, other = rng.randrange(len(data)), rng.randrange(len(data))
    match rng.randrange(7):
        case 0 | 1:
            data[place] ^= 1 << rng.randrange(8)
        case 2:
            del data[place : place + rng.randrange(1, 40)]
        case 3:
            data[place:place] = rng.randbytes(rng.randrange(1, 40))
        case 4:
            del data[place:]
        case 5:
            data[place : place + 8] = data[other : other + 8]
        case 6:
            for _ in range(rng.randrange(2, 30)):
                data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(data)


def nested(depth: int, make: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    return functools.reduce(lambda value, _: make(value), range(depth), None)


def cyclic() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


# What may stand where a number, a name or a list is expected.
NASTY: list[Callable[[], Any]] = [
    lambda: None, lambda: -1, lambda: 0, lambda: 1, lambda: 2**31, lambda: 2**63, lambda: 10**600,
    lambda: -(2**200), lambda: math.nan, lambda: math.inf, lambda: -0.5, lambda: True, lambda: "",
    lambda: "8", lambda: "a\nb\x1b[31m", lambda: "é\udc80", lambda: "x" * 100_000, lambda: "9" * 5000,
    lambda: b"bytes", lambda: [], lambda: {}, lambda: (), lambda: range(3), lambda: [1, 2, 3],
    lambda: {"a": 1, 2: 3}, lambda: {1: 2},
    lambda: nested(400), lambda: nested(60, lambda inner: (inner,)), cyclic, lambda: object,
    lambda: nested(20, lambda inner: [inner] * 10),  # 10**20 items to anyone who prints them
    lambda: torch.float32, lambda: torch.ones(2), lambda: torch.Size([2, 3]), lambda: Path("/etc/passwd"),
    lambda: SimpleNamespace(a=1), lambda: OrderedDict(a=1), lambda: complex(1, 2),
]  # fmt: skip


@dataclass
class Bench:
    """A dense checkpoint to spoil, whole again for each case."""

    folder: Path
    write: Callable[..., Any] = dense_checkpoint.write

    def __post_init__(self) -> None:
        self.root, self.out = self.folder / "dense", self.folder / "moe"
        self.write(self.root, tensor_parallel=2)
        make_stats(self.folder / "ks")
        self.iteration = self.root / "iter_0000008"
        self.whole = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        self.options = Options(RouterConfig(num_experts=2), (self.folder / "ks",))
        shutil.copytree(self.root, self.folder / "kept")

    def spoil(self, path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    def restore(self) -> None:
        for path, content in self.whole.items():
            if path.read_bytes() != content:
                self.spoil(path, content)
        shutil.rmtree(self.out, ignore_errors=True)

    def try_everything(self) -> list[str]:
        """Inspect and convert; what was refused."""

        def convert() -> None:
            ready = conversion.prepare(self.root, self.out, self.options)
            conversion.describe_plan(ready)
            conversion.convert(ready)

        said = [refused(lambda: inspection.describe(self.root, everything=True)), refused(convert)]
        if said[1]:
            assert not self.out.exists()
        else:
            open_checkpoint(self.out)
        made = ["moe"] * self.out.exists()
        assert sorted(path.name for path in self.folder.iterdir()) == ["dense", "kept", "ks", *made]
        return [words for words in said if words]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def spoil_and_try(bench: Bench, path: Path, contents: Iterator[bytes]) -> int:
    """How many of ``contents`` at ``path`` are refused."""
    count = 0
    for content in contents:
        bench.spoil(path, content)
        count += bool(bench.try_everything())
        bench.restore()
    return count


@pytest.mark.parametrize(
    ("file", "count", "refused"),
    [(".metadata", 120, 80), ("metadata.json", 15, 10), ("latest_checkpointed_iteration.txt", 15, 10)],
)
def test_indices_with_changed_bytes(bench: Bench, file: str, count: int, refused: int) -> None:
    rng = random.Random(1)
    (path,) = bench.root.rglob(file)
    cases = [mutated(bench.whole[path], rng) for _ in range(count)]
    cases += [b"[" * 100_000, b"\xff\xfe", b"", b"null", b"9" * 5000, b'{"sharded_backend": ' + b"[" * 50_000]
    assert spoil_and_try(bench, path, iter(cases)) > refused


def spoil_metadata(metadata: Any, rng: random.Random) -> None:
    """Change something in a checkpoint's metadata that its types do not allow, or its sense."""
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    key = rng.choice([key for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)])
    entry, nasty, index = entries[key], rng.choice(NASTY)(), rng.choice(list(storage))
    chunk, axes, size = rng.choice(entry.chunks), len(entry.size), torch.Size
    odd: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "offset": (storage[index], ()),
        "length": (storage[index], ()),
        "relative_path": (storage[index], ("../ks", "/etc/passwd", "", ".", "a\nb", "\0")),
        "size": (entry, (size([2**40, 2**40]), size([0]), [1, 2**80])),
        "dtype": (entry.properties, (torch.int8, torch.float64, torch.complex64)),
        "sizes": (chunk, (size([2**40]), size([2**20, 2**20, 2**20]))),
        "offsets": (chunk, (size([10**9] * axes), [-1] * axes)),
        "state_dict_metadata": (metadata, ()),
        "storage_data": (metadata, ()),
    }
    match rng.randrange(14):
        case 0:
            entry.chunks.pop(rng.randrange(len(entry.chunks)))
        case 1:
            entry.chunks.append(copy.copy(chunk))
        case 2:
            entries[rng.choice(("a\nb\x1b", "decoder.layers", "decoder.layers.", 7, "", "x" * 5000))] = entry
        case 3:
            del storage[index]
        case 4:
            entries[key] = nasty
        case _:
            name = rng.choice(list(odd))
            setattr(odd[name][0], name, rng.choice((nasty, *odd[name][1])))


def test_metadata_that_does_not_make_sense(bench: Bench) -> None:
    rng = random.Random(3)

    def cases() -> Iterator[bytes]:
        for _ in range(150):
            metadata = pickle.loads(bench.whole[bench.iteration / ".metadata"])
            for _ in range(rng.choice((1, 1, 1, 3))):
                with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError):
                    spoil_metadata(metadata, rng)  # or it is spoilt beyond spoiling
            yield pickle.dumps(metadata, protocol=rng.choice((2, 4, 5)))

    assert spoil_and_try(bench, bench.iteration / ".metadata", cases()) > 100


def test_a_billion_layers_are_not_planned(bench: Bench) -> None:
    """One tensor of a billion layers, each of nothing."""
    write_common(bench, args=dense_checkpoint.arguments(num_layers=10**9))
    metadata = pickle.loads(bench.whole[bench.iteration / ".metadata"])
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and key.startswith("decoder.layers."):
            entry.size = torch.Size([10**9, *entry.size[1:]])
            offsets = torch.Size([0] * len(entry.size))
            entry.chunks = [ChunkStorageMetadata(offsets, entry.size)]
            info = next(iter(metadata.storage_data.values()))
            metadata.storage_data[MetadataIndex(key, offsets)] = info
    bench.spoil(bench.iteration / ".metadata", pickle.dumps(metadata))
    assert len(bench.try_everything()) == 2


def write_common(bench: Bench, **common: Any) -> None:
    """Give the checkpoint another common state, in a file of its own as older versions have it."""
    path = bench.iteration / "common.pt"
    if not path.exists():
        shutil.rmtree(bench.root)
        dense_checkpoint.write(bench.root, common_file=True)
        bench.whole = {path: path.read_bytes() for path in bench.root.rglob("*") if path.is_file()}
    torch.save(torch.load(io.BytesIO(bench.whole[path]), weights_only=False) | common, path)


def test_common_state_that_makes_no_sense(bench: Bench) -> None:
    rng = random.Random(4)
    names = [*vars(dense_checkpoint.arguments()), "multi_latent_attention", "mtp_num_layers", "other"]
    cases: list[tuple[str, Callable[[], Any]]] = [(name, rng.choice(NASTY)) for name in names * 3]
    cases += [(name, nasty) for name in ("num_layers", "init_method_std") for nasty in NASTY]
    states = [{"args": dense_checkpoint.arguments(**{name: nasty()})} for name, nasty in cases]
    for place, nasty in enumerate(NASTY):
        other = ("checkpoint_version", "content_metadata", "iteration")[place % 3]
        states += [{"args": nasty()}, {"args": dense_checkpoint.arguments(), other: nasty()}]
    count = 0
    for state in states:
        write_common(bench, **state)
        count += bool(bench.try_everything())
        shutil.rmtree(bench.out, ignore_errors=True)
    assert len(states) > 220 and count > 90


def test_data_files_with_changed_bytes(bench: Bench) -> None:
    """Where the pickles and headers of the small archives lie; values are another matter."""
    rng, checkpoint, path = random.Random(5), open_checkpoint(bench.root), bench.iteration / "__0_0.distcp"
    blobs = [blob for key in (*checkpoint.tensors, *checkpoint.objects) for blob in checkpoint.blobs(key)]
    blobs = [blob for blob in blobs if blob.file == path.name]

    def cases() -> Iterator[bytes]:
        for _ in range(100):
            blob, data = rng.choice(blobs), bytearray(bench.whole[path])
            part = slice(blob.offset, blob.offset + blob.length)
            data[part] = mutated(bytes(data[part]), rng)[: blob.length].ljust(blob.length, b"\0")
            yield bytes(data)

    assert spoil_and_try(bench, path, cases()) > 10


@dataclass
class Calls:
    """Unpickles as a call."""

    function: Any
    args: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return self.function, self.args


def named(module: str, name: str, argument: bytes = b"(Vtouch executed\ntR") -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + argument + b"."


def stacked(module: str, name: str) -> bytes:
    """The same with protocol 4's operation, which takes dotted names."""
    parts = b"".join(bytes([0x8C, len(part)]) + part for part in (module.encode(), name.encode()))
    return b"\x80\x04" + parts + b"\x93\x8c\x0etouch executed\x85R."


HOSTILE = [
    *(pickle.dumps(Calls(function, ("touch executed",))) for function in (os.system, eval, exec, os.popen)),
    *(
        make(module, name)
        for make in (named, stacked)
        for module, name in (
            ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
            ("builtins", "open"), ("subprocess", "Popen"), ("importlib", "import_module"),
            ("runpy", "run_path"), ("pickle", "loads"), ("torch", "load"), ("torch", "os.system"),
            ("torch.serialization", "os.system"), ("torch.storage", "_load_from_bytes"),
            ("signal", "raise_signal"), ("argparse", "_sys.exit"), ("collections", "_sys.exit"),
            ("pathlib", "PosixPath.unlink"), ("types", "FunctionType"), ("functools", "partial"),
            ("torch.distributed.checkpoint.os", "system"), ("numpy", "load"),
        )
    ),
    # The classes that are allowed, called with what they are not for.
    *(pickle.dumps(Calls(function, args)) for function, args in (
        (argparse.Namespace, ()), (SimpleNamespace, ()), (OrderedDict, (nested(50),)),
        (signal.Signals, (9,)), (signal.Signals, ("x",)), (Path, ("/etc/passwd",)),
        (torch.serialization._get_layout, ("os",)), (torch.Size, ((-1, 2**62),)), (torch.Size, ("ab",)),
    )),
    # Plain data that harms.
    b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memo: 32 GB
    b"\x80\x02Nr\xff\xff\xff\xff.",
    b"\x80\x04N" + b"\x85" * 200_000 + b"}\x94h\x00Ns.",  # tuples to overflow the stack, as a dict's key
    b"\x80\x04}N" + b"".join(b"\x94h%ch%c\x87" % (n, n) for n in range(60)) + b"Ns.",  # 3**60 of them
    b"\x80\x04]" + b"]" * 300_000 + b"a" * 300_000 + b".",  # lists
    b"\x80\x04}" + b"K\x01}" * 200_000 + b"s" * 200_000 + b".",
    b"\x80\x04cargparse\nNamespace\n}\x8c\x06__eq__Nsb.",  # a class is changed
    b"\x80\x04carg" + b"parse\nNamespace\nN}\x8c\x08__init__Ns\x86b.",
    b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"short.",  # lengths
    b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"short.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"short.",
    b"\x80\x04X\xff\xff\xff\xffshort.",
    b"\x80\x04\x8b" + struct.pack("<I", 2**31 - 1) + b"short.",
    b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b"N.",
    b"\x80\x04\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000 + b".",  # an integer of 240,000 digits
    b"\x80\x04\x82\x01.", b"\x80\x02Pos\n.", b"I" + b"9" * 100_000 + b"\n.", b"\x80\xff.", b".", b"(", b"0.",
    b"\x80\x05\x97.", b"\x80\x04h\xff.", b"\x80\x04j\xff\xff\xff\xff.",
    b"(ios\nsystem\n.", b"(cos\nsystem\no.",
]  # fmt: skip


def as_archive(pickled: bytes, compress: int = zipfile.ZIP_STORED, values: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", values)
    return buffer.getvalue()


def test_hostile_pickles(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As metadata, as the common state, and in place of a tensor."""
    monkeypatch.chdir(bench.folder / "kept")
    assert len(HOSTILE) > 60
    checkpoint, whole = open_checkpoint(bench.root), bench.whole[bench.iteration / ".metadata"]
    key = f"{dense_checkpoint.MLP}.linear_fc2.weight"
    chunk = checkpoint.tensors[key].chunks[0]
    state = "common_state/shard_0_1"
    places = ((state, None, checkpoint.objects[state]), (key, torch.Size(chunk.offsets), chunk.blob))
    for number, pickled in enumerate(HOSTILE):
        assert spoil_and_try(bench, bench.iteration / ".metadata", iter([pickled])) == 1
        for name, offsets, blob in places[: 2 if number < 8 else 1]:
            archive = as_archive(pickled, values=bytes(blob.length) if offsets else b"")
            metadata, path = pickle.loads(whole), bench.iteration / blob.file
            place = metadata.storage_data[MetadataIndex(name, offsets)]
            place.offset, place.length = len(bench.whole[path]), len(archive)
            bench.spoil(bench.iteration / ".metadata", pickle.dumps(metadata))
            bench.spoil(path, bench.whole[path] + archive)
            said = bench.try_everything()
            assert len(said) == (1 if offsets else 2), said  # inspect reads no values
            assert key in said[0] or "it was not run" in said[0] or not offsets, said
            bench.restore()
    assert not list(bench.folder.rglob("executed"))


def with_pickle(content: bytes, pickled: Callable[[bytes], bytes]) -> bytes:
    """A ``torch.save`` file with another pickle, its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, pickled(record) if name.endswith("data.pkl") else record)
    return buffer.getvalue()


def test_legacy_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes changed anywhere and in the pickle alone; entries that make no sense; hostile pickles."""
    bench = Bench(tmp_path, legacy_checkpoint.write)
    monkeypatch.chdir(bench.folder / "kept")
    rng, path = random.Random(6), bench.iteration / "mp_rank_01/model_optim_rng.pt"
    content = bench.whole[path]
    assert not bench.try_everything()
    bench.restore()
    assert spoil_and_try(bench, path, (mutated(content, rng) for _ in range(60))) > 50
    in_pickle = (with_pickle(content, lambda pickled: mutated(pickled, rng)) for _ in range(100))
    assert spoil_and_try(bench, path, in_pickle) > 70

    def senseless() -> Iterator[bytes]:
        for make in NASTY * 3:
            state, buffer = torch.load(io.BytesIO(content), weights_only=False), io.BytesIO()
            place = rng.choice((state, state["model"], vars(state["args"])))
            name = rng.choice(list(place))
            if place is state["model"] and rng.random() < 0.5:
                name, make = make() if make().__hash__ else "decoder.layers.9.x", lambda: torch.ones(2)
            place[name] = make()
            torch.save(state, buffer)
            yield buffer.getvalue()

    assert spoil_and_try(bench, path, senseless()) > 40
    hostile = (with_pickle(content, lambda pickled, other=other: other) for other in HOSTILE)
    assert spoil_and_try(bench, path, hostile) == len(HOSTILE)
    assert not list(bench.folder.rglob("executed"))


def test_compressed_archives_are_not_unpacked(bench: Bench) -> None:
    """A million times smaller than what they hold."""
    bomb = as_archive(b"\x80\x04B" + struct.pack("<I", 1 << 29) + bytes(1 << 24), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        torch_save_file.load(bomb, "common state")


def refusals(path: Path, cases: list[bytes], read: Callable[[], object]) -> int:
    """How many of ``cases`` at ``path`` ``read`` refuses."""
    count = 0
    for case in cases:
        path.write_bytes(case)
        count += bool(refused(read))
    return count


def test_manifests(bench: Bench) -> None:
    rng = random.Random(6)
    conversion.convert(conversion.prepare(bench.root, bench.out, bench.options))
    path = bench.out / manifest.NAME
    content = path.read_bytes()
    cases = [mutated(content, rng) for _ in range(60)]
    for _ in range(80):
        record = json.loads(content)
        place = rng.choice((record, record["router"], record["model"], record["source"]))
        nasty = rng.choice([2**70, -1, None, [], {}, "a\nb", "x" * 9999, 1e999, [[[[1]]]], {"a": 1}, True])
        place[rng.choice(list(place))] = nasty
        cases.append(json.dumps(record).encode())
    cases += [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"", b"null", b"{}", b'"a"']
    cases += [b'{"format": 1, "router": %s}' % router for router in (b"[" * 900 + b"]" * 900, b'{"a": 1}')]

    def read() -> None:
        found = manifest.read(bench.out)
        assert found is not None
        manifest.router_config(found, path)

    assert refusals(path, cases, read) > 60
    refusals(path, cases, lambda: inspection.describe(bench.out))


def test_key_statistics(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "ks"
    make_stats(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    cases = [mutated(content, rng) for _ in range(80)]
    for _ in range(60):
        changed = copy.deepcopy(header)
        if rng.random() < 0.5:
            name = rng.choice(list(changed["__metadata__"]))
            changed["__metadata__"][name] = rng.choice(
                ("", "nan", "1e999", "null", "[" * 5000, "9" * 5000, '"a\\nb"', "[[1]]", "-1", '{"a":1}', "x")
            )
        else:
            entry = changed[rng.choice(["key_mean", "key_attended", "key_count"])]
            entry[rng.choice(list(entry))] = rng.choice(([2**40], [0, 8], [-1, 4], "F32", "I64", None, [[1]]))
        encoded = json.dumps(changed).encode()
        cases.append(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    cases += [b"", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**40) + content[8:]]
    assert refusals(path, cases, lambda: key_stats_file.load(path)) > 80


YAML = b"num_layers: 4\nhidden_size: 64\nswiglu: true\nlr: 1.0e-3\ndata_path: [a, b]\n"
YAML += b"upcycling:\n  router: mixture\n  num_routers: 8\n"


def test_yaml(tmp_path: Path) -> None:
    rng = random.Random(8)
    path = tmp_path / "config.yaml"
    parser = argparse.ArgumentParser()
    for name, kind in (("--num-layers", int), ("--hidden-size", int), ("--lr", float)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--data-path", nargs="*")
    cases = [mutated(YAML, rng) for _ in range(80)]
    cases += [
        b"!!python/object/apply:os.system ['touch executed']", b"!!python/name:os.system", b"a: &a [*a]",
        b"[" * 3000, b"{a: " * 3000, b"a: " * 200, b"- " * 3000, b"\xff\xfe", b"\0", b"num_layers: 1e999",
        b"num_layers: " + b"9" * 6000, b"base: [1]", b"base: {a: 1}", b"base: config.yaml", b"base: 7",
        b"base: /", b"base: .", b"base: \"a\\0b\"", b"? [a]\n: 1", b"upcycling: 3",
        b"upcycling: {? {a: 1} : 2}",
        b"num_layers: [1]", b"num_layers: {a: 1}", b"1: 2", b"lr: 2001-01-01", b"swiglu: maybe",
        b"swiglu: [true]", b"lr: !!binary aGk=",
        b"a: &l [x,x,x,x]\nb: &m [*l,*l,*l,*l]\nc: &n [*m,*m,*m,*m]\nnum_layers: [*n,*n]",
        b"num_layers: &x [*x]", b"num_layers: !!set {a}", b"<<: 3", b"<<: [3]", b"base: \"\\ud800\"",
    ]  # fmt: skip

    def read() -> None:
        entries = yaml_files.read_yaml(path)
        section = entries.pop("upcycling")
        flags.set_defaults(parser, entries, path)
        flags.split_section(section, path)

    assert refusals(path, cases, read) > 40
    assert not list(tmp_path.rglob("executed"))
