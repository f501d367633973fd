"""Find the text files: those that the command names, and those in the folders that it names."""

import contextlib
import hashlib
import io
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_router_upcycling.errors import UserError, described, error_as

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# A .json file holds lines or one array; .arrow files belong to a saved data set.
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
KINDS |= {".warc": "warc", ".wet": "warc", ".arrow": "arrow"}
# Each of these files is one document.
KINDS |= dict.fromkeys(
    """
    .txt .text .md .rst .tex .org .adoc .html .htm .xml .css .yaml .yml .toml .ini .cfg .sql .proto .cmake
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .jsx .ts .tsx .go .rs .rb .php .cs .scala .kt
    .swift .sh .bash .r .jl .lua .pl .hs .ml .clj .ex .erl .f .f90 .asm .s .v .vhd
    """.split(),  # noqa: SIM905 (a list would fill a screen)
    "text",
)
READ = ".jsonl, .json, .parquet, .csv, .warc, .txt or code"
HIDDEN = re.compile(r"\.|__pycache__$")
# Left out of the standard library: tests, third-party packages, character tables, build outputs.
SKIPPED = re.compile("/(test|tests|idle_test|site-packages|dist-packages|encodings)/|/_sysconfigdata")


@dataclass(frozen=True)
class Source:
    """A file: its path or URL (s3://...), and the kind of its content (a value of ``KINDS``)."""

    path: str
    kind: str
    size: int  # bytes as stored; 0 where a server does not say
    state: str  # changes when the file is written


def blamed(path: str) -> contextlib.AbstractContextManager[None]:
    """Turn any error that a library raises in this block into a UserError that names ``path``."""
    return error_as(Exception, f"SOURCE {path}: cannot be read, or is cut short or damaged", say=described)


def zstd(file: Any, **_: Any) -> Any:
    """The reader of .zst. fsspec's own, zstandard, raises no error when a file is truncated."""
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
    """The files of ``places`` in the order given. A folder's files are ordered by the hashes of their names,
    so that its first N tokens are an even sample rather than the files whose names begin with "a".

    Hidden files and folders are skipped. Files of unknown kind in folders are counted by suffix.
    """
    found: dict[str, Source] = {}
    left_out: Counter[str] = Counter()
    for place in map(str, places):
        if "://" in place:
            sources = _remote(place, left_out)
        elif os.path.isdir(place):
            sources = _saved_data_set(Path(place)) or _in_folder(place, left_out)
        elif os.path.isfile(place):
            sources = [_local(place)]
        else:
            raise UserError(f"SOURCE {place}: there is no such file or folder")
        for source in sources:
            if found.setdefault(os.path.realpath(source.path), source) is not source:
                raise UserError(f"SOURCE {source.path}: is named twice; name it once")
    return list(found.values()), left_out


def python_library() -> list[Source]:
    """The Python standard library, without the files that are poor training text (``SKIPPED``)."""
    library = sysconfig.get_path("stdlib")
    return [source for source in _python(library) if not SKIPPED.search(source.path.removeprefix(library))]


def python_packages() -> list[Source]:
    """The Python source of the packages that are installed in this environment."""
    folders = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return [source for folder in sorted(folders) for source in _python(folder)]


def _python(folder: str) -> Iterator[Source]:
    """The Python source files of a folder that are UTF-8, which is all but a few old files and tests."""
    for source in _in_folder(folder, Counter()):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if source.path.endswith(".py") and "\0" not in Path(source.path).read_bytes().decode():
                yield source


def _suffix(path: str) -> str:
    """The suffix that decides a file's kind: .jsonl for texts.jsonl.gz."""
    name = PurePosixPath(path)
    inner = name.with_suffix("") if name.suffix.lower() in COMPRESSED else name
    return inner.suffix.lower()


def _source(path: str, size: int, state: Any) -> Source:
    if _suffix(path) not in KINDS:
        raise UserError(
            f"SOURCE {path}: its name says no known kind; give {READ} (also as .gz, .bz2, .xz or .zst), a"
            " folder of these, or a data set saved to disk"
        )
    return Source(path, KINDS[_suffix(path)], size, str(state))


def _local(path: str) -> Source:
    stat = os.stat(path)
    return _source(path, stat.st_size, stat.st_mtime_ns)


def _remote(place: str, left_out: Counter[str]) -> list[Source]:
    with blamed(place):
        files, path = file_system(place)
        found = {path: files.info(path)}
        if folder := found[path]["type"] == "directory":
            found = files.find(path, detail=True)
    names = {os.path.relpath(name, path): name for name in found}
    return [
        _source(files.unstrip_protocol(name), found[name].get("size") or 0, found[name])
        for name in (_known(place, names, left_out) if folder else found)
    ]


def _in_folder(folder: str, left_out: Counter[str]) -> list[Source]:
    names: dict[str, str] = {}

    def refuse(error: OSError) -> None:
        raise error

    with blamed(folder):
        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not HIDDEN.match(name)]
            paths = (os.path.join(parent, name) for name in files)
            names |= {os.path.relpath(path, folder): path for path in paths if os.path.isfile(path)}
    return [_local(path) for path in _known(folder, names, left_out)]


def _known(folder: str, names: dict[str, str], left_out: Counter[str]) -> list[str]:
    """The paths of a folder's files of known kinds, in order. ``names``: name in the folder -> path."""
    known = []
    for name in sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if any(map(HIDDEN.match, PurePosixPath(name).parts)):
            continue
        if _suffix(name) in KINDS:
            known.append(names[name])
        else:
            left_out[_suffix(name) or PurePosixPath(name).name] += 1
    if not known:
        raise UserError(f"SOURCE {folder}: holds no {READ}")
    return known


def _saved_data_set(folder: Path) -> list[Source]:
    """The tables of a data set that ``datasets`` saved in ``folder``; empty for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"SOURCE {folder}: a data set with splits; name one of them, as {folder}/train")
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    with blamed(str(folder)):
        files = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [_local(str(folder / Path(file["filename"]).name)) for file in files]
