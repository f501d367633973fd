"""Which files of text there are: what a command names, and what lies in the folders that it names."""

import contextlib
import hashlib
import io
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_router_upcycling.errors import UserError, described, reason

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DATA = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
DATA |= {".warc": "warc", ".wet": "warc", ".arrow": "arrow"}
# A file of these is one document.
TEXT = frozenset(
    """
    .txt .text .md .rst .tex .org .adoc .html .htm .xml .css .yaml .yml .toml .ini .cfg .sql .proto .cmake
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .jsx .ts .tsx .go .rs .rb .php .cs .scala .kt
    .swift .sh .bash .r .jl .lua .pl .hs .ml .clj .ex .erl .f .f90 .asm .s .v .vhd
    """.split()  # noqa: SIM905 (a list would fill a screen)
)
READ = ".jsonl, .json, .parquet, .csv, .warc, .txt or code"
# In the standard library: tests, other people's packages, tables of characters, what a build wrote.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
SKIPPED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Source:
    """A file: its path or address (s3://...), and what it holds: ``lines`` of JSON, an ``array`` of JSON, a
    table (``parquet``, ``csv``, ``arrow`` of a saved data set), ``warc``, or ``text`` (one document)."""

    path: str
    kind: str
    size: int  # bytes as stored; 0 where a server does not say
    state: str  # changes when the file is written

    @property
    def compressed(self) -> bool:
        return self.path.lower().endswith(COMPRESSED)


@contextlib.contextmanager
def blamed(path: str) -> Iterator[None]:
    """Whatever the libraries raise within is the fault of the file or address ``path``.

    Raises:
        UserError: instead.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"SOURCE {path}: {reason(error)}") from None
    except Exception as error:
        what = getattr(error, "strerror", None) or described(error)
        raise UserError(f"SOURCE {path}: cannot be read, or is cut short or damaged ({what})") from None


def zstd(file: Any, **_: Any) -> Any:
    """The reader of .zst: zstandard, which fsspec takes, ends without an error where a file was cut short."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 20)


def file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system for ``path``, and its name there."""
    from fsspec import url_to_fs
    from fsspec.compression import register_compression
    from fsspec.implementations.local import LocalFileSystem

    register_compression("zstd", zstd, "zst", force=True)
    return url_to_fs(path) if "://" in path else (LocalFileSystem(), os.path.abspath(path))


def find(places: Iterable[str | Path]) -> tuple[list[Source], Counter[str]]:
    """The files of ``places`` in the order given; those of a folder in an order fixed by their names' hashes,
    so that the first so many tokens are an even sample rather than the names that begin with "a".

    Hidden files and folders are passed over.

    Returns:
        The files, and how many files of no known kind lie in the folders, by the end of their name.

    Raises:
        UserError: there is no such file or folder, or nothing usable in it, or a file is named twice.
    """
    found: dict[str, Source] = {}
    left_out: Counter[str] = Counter()
    for place in map(str, places):
        if "://" in place:
            sources = _remote(place, left_out)
        elif os.path.isdir(place):
            sources = _saved_data_set(Path(place)) or _in_folder(Path(place), left_out)
        elif os.path.isfile(place):
            sources = [_source(place)]
        else:
            raise UserError(f"SOURCE {place}: there is no such file or folder")
        for source in sources:
            if found.setdefault(os.path.realpath(source.path), source) is not source:
                raise UserError(f"SOURCE {source.path}: is named twice; name it once")
    return list(found.values()), left_out


def python_library() -> list[Source]:
    """The Python standard library, without what of it is not worth learning from."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        source
        for source in _python(library)
        if not set(Path(source.path).relative_to(library).parts) & SKIPPED_FOLDERS
        and not Path(source.path).name.startswith(SKIPPED_PREFIX)
    ]


def python_packages() -> list[Source]:
    """The Python source of the packages that are installed in this environment."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return [source for folder in sorted(folders) for source in _python(folder)]


def _python(folder: Path) -> list[Source]:
    return [source for source in _in_folder(folder, Counter(), {".py"}) if _is_utf8(Path(source.path))]


def _is_utf8(path: Path) -> bool:
    """Whether Python's source is UTF-8, as all but a few old files and tests of encodings are."""
    try:
        return b"\0" not in (content := path.read_bytes()) and bool(content.decode() or True)
    except (OSError, UnicodeDecodeError):
        return False


def state_of(sources: Iterable[Source]) -> str:
    """A digest that changes when a file is added, removed, moved or written (by size and time)."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(
            f"{os.path.realpath(source.path)}\0{source.size}\0{source.state}\n".encode(errors="replace")
        )
    return digest.hexdigest()


def _suffix(path: str) -> str:
    """The end of a name that says its kind: .jsonl of texts.jsonl.gz."""
    name = PurePosixPath(path)
    inner = name.with_suffix("") if name.suffix.lower() in COMPRESSED else name
    return inner.suffix.lower()


def _kind(path: str) -> str | None:
    suffix = _suffix(path)
    return "text" if suffix in TEXT else DATA.get(suffix)


def _source(path: str, size: int | None = None, state: str | None = None) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(
            f"SOURCE {path}: its name says no known kind; give {READ} (also as .gz, .bz2, .xz or .zst), a"
            " folder of these, or a data set saved to disk"
        )
    if kind == "json":
        files, name = file_system(path)
        with blamed(path), files.open(name, "rb", compression="infer") as file:
            kind = (
                "array" if file.read(1 << 10).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[" else "lines"
            )
    if state is None:
        stat = os.stat(path)
        size, state = stat.st_size, str(stat.st_mtime_ns)
    source = Source(path, kind, size or 0, state)
    if source.compressed and kind in ("parquet", "arrow"):
        raise UserError(f"SOURCE {path}: a .{kind} file is compressed within; unpack it first")
    return source


def _remote(place: str, left_out: Counter[str]) -> list[Source]:
    with blamed(place):
        files, path = file_system(place)
        found = {path: files.info(path)}
        if folder := found[path]["type"] == "directory":
            found = files.find(path, detail=True)
    sources = []
    for name, info in sorted(found.items(), key=lambda file: _hash(os.path.relpath(file[0], path))):
        if folder and not _kind(name):
            left_out[_suffix(name) or name] += 1
        elif not any(
            part.startswith((".", "__pycache__")) for part in PurePosixPath(os.path.relpath(name, path)).parts
        ):
            state = repr(sorted((key, str(value)) for key, value in info.items()))
            sources.append(_source(files.unstrip_protocol(name), info.get("size"), state))
    if not sources:
        raise UserError(f"SOURCE {place}: holds no {READ}")
    return sources


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _in_folder(folder: Path, left_out: Counter[str], suffixes: set[str] | None = None) -> list[Source]:
    paths = []

    def refuse(error: OSError) -> None:
        raise UserError(f"SOURCE {error.filename}: cannot be read ({reason(error)})") from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if suffixes is not None and path.suffix not in suffixes or not path.is_file():
                continue
            if _kind(str(path)):
                paths.append(path)
            else:
                left_out[_suffix(str(path)) or path.name] += 1
    if not paths:
        raise UserError(f"SOURCE {folder}: holds no {READ}")
    return [
        _source(str(path))
        for path in sorted(paths, key=lambda path: _hash(path.relative_to(folder).as_posix()))
    ]


def _saved_data_set(folder: Path) -> list[Source]:
    """The tables of a data set that ``datasets`` has saved in ``folder``; none if it is another folder."""
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"SOURCE {folder}: a data set with splits; name one of them, as {folder}/train")
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return []
    with blamed(str(state)):
        names = [Path(entry["filename"]).name for entry in json.loads(state.read_bytes())["_data_files"]]
        return [_source(str(folder / name)) for name in names]
