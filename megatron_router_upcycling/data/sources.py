"""Which files of text there are: what a command names, and what lies in the folders that it names."""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_router_upcycling.errors import UserError, reason, shown

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DATA = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
# A file of these is one document.
TEXT = frozenset(
    """
    .txt .text .md .rst .tex .org .adoc .html .htm .xml .css .yaml .yml .toml .ini .cfg .sql .proto .cmake
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .jsx .ts .tsx .go .rs .rb .php .cs .scala .kt
    .swift .sh .bash .r .jl .lua .pl .hs .ml .clj .ex .erl .f .f90 .asm .s .v .vhd
    """.split()  # noqa: SIM905 (a list would fill a screen)
)
# In the standard library: tests, other people's packages, tables of characters, what a build wrote.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
SKIPPED_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Source:
    """A file and what it holds: ``lines`` of JSON, ``json`` (an array, or lines), ``parquet``, ``arrow`` (a
    table of a saved data set) or ``text`` (one document)."""

    path: Path
    kind: str
    size: int  # bytes on the disk
    written: int  # nanoseconds since 1970

    @property
    def compression(self) -> str | None:
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else None


def find(places: Iterable[Path]) -> tuple[list[Source], Counter[str]]:
    """The files of ``places`` in the order given; those of a folder in an order fixed by their names' hashes,
    so that the first so many tokens are an even sample rather than the names that begin with "a".

    Hidden files and folders are passed over.

    Returns:
        The files, and how many files of no known kind lie in the folders, by the end of their name.

    Raises:
        UserError: there is no such file or folder, or nothing usable in it, or a file is named twice.
    """
    found: dict[Path, Source] = {}
    left_out: Counter[str] = Counter()
    for place in places:
        if place.is_dir():
            sources = _saved_data_set(place) or _in_folder(place, left_out)
        elif place.is_file():
            sources = [_source(place)]
        else:
            raise UserError(f"SOURCE {place}: there is no such file or folder")
        for source in sources:
            if found.setdefault(source.path.resolve(), source) is not source:
                raise UserError(f"SOURCE {source.path}: is named twice; name it once")
    return list(found.values()), left_out


def python_library() -> list[Source]:
    """The Python standard library, without what of it is not worth learning from."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        source
        for source in _python(library)
        if not set(source.path.relative_to(library).parts) & SKIPPED_FOLDERS
        and not source.path.name.startswith(SKIPPED_PREFIX)
    ]


def python_packages() -> list[Source]:
    """The Python source of the packages that are installed in this environment."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return [source for folder in sorted(folders) for source in _python(folder)]


def _python(folder: Path) -> list[Source]:
    return [source for source in _in_folder(folder, Counter(), {".py"}) if _is_utf8(source.path)]


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
        digest.update(f"{source.path.resolve()}\0{source.size}\0{source.written}\n".encode(errors="replace"))
    return digest.hexdigest()


def _suffix(path: Path) -> str:
    """The end of a name that says its kind: .jsonl of texts.jsonl.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def _kind(path: Path) -> str | None:
    suffix = _suffix(path)
    return "text" if suffix in TEXT else DATA.get(suffix)


def _stated(path: Path, kind: str) -> Source:
    stat = path.stat()
    return Source(path, kind, stat.st_size, stat.st_mtime_ns)


def _source(path: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(
            f"SOURCE {path}: its name says no known kind; give .jsonl, .json, .parquet, .txt or code (also as"
            " .gz, .bz2, .xz or .zst), a folder of these, or a data set saved to disk"
        )
    source = _stated(path, kind)
    if source.compression and kind in ("parquet", "arrow"):
        raise UserError(f"SOURCE {path}: a .{kind} file is compressed within; unpack it first")
    return source


def _in_folder(folder: Path, left_out: Counter[str], suffixes: set[str] | None = None) -> list[Source]:
    paths = []

    def refuse(error: OSError) -> None:
        raise UserError(f"SOURCE {error.filename}: cannot be read ({reason(error)})") from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if suffixes is not None and path.suffix not in suffixes or not path.is_file():
                continue
            if _kind(path):
                paths.append(path)
            else:
                left_out[_suffix(path) or path.name] += 1
    if not paths:
        raise UserError(f"SOURCE {folder}: holds no .jsonl, .json, .parquet, .txt or code")

    def by_hash(path: Path) -> bytes:
        return hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).digest()

    return [_source(path) for path in sorted(paths, key=by_hash)]


def _saved_data_set(folder: Path) -> list[Source]:
    """The tables of a data set that ``datasets`` has saved in ``folder``; none if it is another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _entry(folder / "dataset_dict.json", "splits")
        if len(splits) != 1:
            named = ", ".join(map(shown, splits))
            raise UserError(
                f"SOURCE {folder}: a data set with the splits {named}; name one, as in {folder}/train"
            )
        return _saved_data_set(folder / str(splits[0]))
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    files = _entry(folder / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in files]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"SOURCE {folder}: its state.json names {shown(name)}, which is not there")
    paths = [folder / str(name) for name in names]
    return [_stated(path, "arrow") for path in paths]


def _entry(path: Path, name: str) -> list:
    try:
        entry = json.loads(path.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        entry = None
    if not isinstance(entry, list):
        raise UserError(f"SOURCE {path}: is not what datasets writes: it has no list {name}")
    return entry
