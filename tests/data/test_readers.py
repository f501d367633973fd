"""data/sources.py and readers.py: every document of every kind of file, and what is none."""

import bz2
import copy
import csv
import functools
import gzip
import http.server
import io
import json
import lzma
import threading
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_router_upcycling.data import parts, readers, sources
from megatron_router_upcycling.errors import UserError
from tests.data import small

TEXTS = ["one\r\ntwo", "naïve 日本語", 'quotes " and \\ back', "x" * 5000, *small.documents(40)]


def read(*places: object, key: str = "text", longest: int = 1 << 20, size: int = 4000) -> list[str]:
    """Texts, and of bad documents what is said of them."""
    found, _ = sources.find(map(str, places))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SMALLEST_TASK", size)
        tasks = readers.tasks(found)
    pieces = [piece for task in tasks for piece in task]
    assert [piece.source for piece in pieces if piece.start == 0] == found
    options = small.options(text_key=key, max_document_bytes=longest)
    return [why or text for piece in pieces for text, why in readers.read(piece, options)]


def as_array(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps([{"id": 1.5, "text": text} for text in texts], indent=2))
    return path


def as_parquet(path: Path, texts: list, kind: object = None) -> Path:
    column = pyarrow.array(texts, kind or pyarrow.string())
    table = pyarrow.table({"text": column, "n": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def as_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("n", "text"), *enumerate(texts)])
    return path


def as_data_set(path: Path, texts: list) -> Path:
    datasets.Dataset.from_dict({"text": texts, "n": texts}).save_to_disk(path, num_shards=2)
    return path


KINDS = {
    "texts.jsonl": small.lines,
    "lines.json": small.lines,
    "array.json": as_array,
    "texts.parquet": as_parquet,
    "large.parquet": functools.partial(as_parquet, kind=pyarrow.large_string()),
    "texts.csv": as_csv,
    "data_set": as_data_set,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 3000, 1 << 20])
def test_every_kind_gives_its_texts_in_order(name, size, tmp_path):
    assert read(KINDS[name](tmp_path / name, TEXTS), size=size) == TEXTS


def test_a_large_file_of_lines_and_a_large_table_are_cut_the_same_way_each_time(tmp_path):
    lines, table = small.lines(tmp_path / "a.jsonl", TEXTS * 600), as_parquet(tmp_path / "b.parquet", TEXTS)
    found, _ = sources.find([lines, table])
    tasks, smallest = readers.tasks(found), readers.SMALLEST_TASK
    assert found[0].size > 2 * smallest and len(tasks) == found[0].size // smallest + 1
    assert tasks == readers.tasks(found) and [piece.source for piece in tasks[-1]] == found
    assert [piece.size for task in tasks[:-1] for piece in task] == [smallest] * (len(tasks) - 1)
    assert sum(piece.size for task in tasks for piece in task) == sum(source.size for source in found)


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["texts.jsonl", "array.json", "texts.csv", "a.txt"])
def test_compressed_files_are_read_whole_and_cut_ones_refused(suffix, kind, tmp_path):
    plain = tmp_path / kind
    if kind == "a.txt":
        plain.write_text("\n".join(TEXTS).replace("\0", ""), encoding="utf-8", newline="")
    else:
        KINDS[kind](plain, TEXTS)
    wanted, content = read(plain), plain.read_bytes()
    half = len(content) // 2
    packed = tmp_path / (kind + suffix)
    packed.write_bytes(COMPRESS[suffix](content[:half]) + COMPRESS[suffix](content[half:]))
    assert read(packed) == wanted
    for damaged in (packed.read_bytes()[:-400], b"not compressed" * 9):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"SOURCE {packed}: cannot be read, or is cut short"):
            read(packed)


def test_marks_blank_lines_and_ends_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n\t{"text": "two"}\n\n{"text": "three"}')
    for size in (1, 5, 1 << 20):
        assert read(path, size=size) == ["one", "", "", "two", "", "three"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    for name in ("empty.jsonl", "empty.txt", "empty.json", "empty.csv"):
        (tmp_path / name).touch()
    assert read(tmp_path / "a.txt", *sorted(tmp_path.glob("empty.*"))) == ["a\r\nb", ""]


NO_TEXT = "has no text 'text'; see --text-key"
BAD_LINES = {
    b'{"text": null}': NO_TEXT,
    b'{"text": ["a"]}': NO_TEXT,
    b'{"body": "a", "id": 1}': NO_TEXT,
    b"[1]": NO_TEXT,
    b'"text"': NO_TEXT,
    b"nonsense": "Expecting value: line 1 column 1",
    b'{"text": "\\ud83d y"}': "'utf-8' codec can't encode character '\\ud83d'",
    b'{"text": "\xe9"}': "'utf-8' codec can't decode byte 0xe9 in position 10",
    b'{"a":' * 50_000: "maximum recursion depth exceeded",
    b'{"text": "' + b"a" * 400_000 + b'"}': "is longer than 300,000 bytes; cut it into documents, or raise"
    " --max-document-bytes",
}  # fmt: skip


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(good + b"\n" + line + b"\n" for line in BAD_LINES) + good)
    for size in (1 << 20, 64):
        found = read(tmp_path / "a.jsonl", longest=300_000, size=size)
        assert found[::3] == ["good"] * (len(BAD_LINES) + 1) and set(found[1::3]) == {""}
        for bad, why in zip(found[2::3], BAD_LINES.values(), strict=True):
            assert bad.startswith(why)


def test_a_line_may_be_as_long_as_the_limit(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abc"}\n' * 2 + b'{"text": "abc"} \n' + b'{"text": "d"}')
    first, second, longer, last = read(tmp_path / "a.jsonl", longest=15)
    assert (first, second, last) == ("abc", "abc", "d") and longer.startswith("is longer than 15 bytes")
    (tmp_path / "b.txt").write_text("é" * 7)
    assert read(tmp_path / "b.txt", longest=14) == ["é" * 7] != read(tmp_path / "b.txt", longest=13)


def test_rows_without_a_text_are_named_in_every_table(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": null}, 7]')
    assert read(tmp_path / "a.json") == ["a", NO_TEXT, NO_TEXT]
    assert read(as_parquet(tmp_path / "a.parquet", ["a", None, "b"])) == ["a", NO_TEXT, "b"]
    assert read(as_data_set(tmp_path / "set", ["a", None, "b"])) == ["a", NO_TEXT, "b"]
    (tmp_path / "a.csv").write_text(f"n,text\n1,{'a' * 200_000}\n2\n")  # Python's own limit is 131,072
    assert read(tmp_path / "a.csv") == ["a" * 200_000, NO_TEXT]
    other = "has no text 'body'; see --text-key"
    for table in ("a.json", "a.parquet", "set", "a.csv"):
        assert set(read(tmp_path / table, key="body")) == {other}
    assert read(tmp_path / "a.parquet", key="body") == [other] * 3 == read(tmp_path / "set", key="body")


def test_damaged_tables_and_arrays_are_refused(tmp_path):
    table = as_parquet(tmp_path / "a.parquet", TEXTS)
    table.write_bytes(table.read_bytes()[:500])
    arrow = next(as_data_set(tmp_path / "saved", TEXTS).glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:700])
    (tmp_path / "a.json").write_text('[{"text": "a"}')
    for place in (table, tmp_path / "saved", tmp_path / "a.json"):
        with pytest.raises(UserError, match=r"cannot be read, or is cut short or damaged"):
            read(place)


def test_bad_files_of_text_are_named(tmp_path):
    for content, why in {
        "a\nnaïve".encode("latin-1"): "'utf-8' codec can't decode byte 0xef in position 4",
        b"\x7fELF\0\0": "is binary",
        b"x" * 200: "is longer than 100 bytes",
    }.items():
        (tmp_path / "b.txt").write_bytes(content)
        assert read(tmp_path / "b.txt", longest=100)[0].startswith(why)


def test_pages_of_a_crawl_are_read(tmp_path):
    pytest.importorskip("warcio"), pytest.importorskip("magic")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with (tmp_path / "crawl.warc.wet.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number, text in enumerate(["erste Seite, naïve", "日本語"]):
            headers = StatusAndHeaders("", [("WARC-Identified-Payload-Type", "text/plain")], protocol="")
            writer.write_record(writer.create_warc_record(
                f"http://a/{number}", "conversion", payload=io.BytesIO(text.encode()),
                warc_headers_dict=dict(headers.headers),
            ))  # fmt: skip
    assert read(tmp_path / "crawl.warc.wet.gz") == ["erste Seite, naïve", "日本語"]


def test_an_address_is_read_as_the_file_behind_it(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(small.lines(tmp_path / "a.jsonl", TEXTS).read_bytes())
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert read(f"{address}/a.jsonl.gz") == TEXTS
        with pytest.raises(UserError, match="no.jsonl: cannot be read"):
            read(f"{address}/no.jsonl")
        server.shutdown()
    assert read(f"file://{tmp_path}/") == TEXTS * 2
    with pytest.raises(UserError, match=r"SOURCE nothing://x: cannot be read"):
        sources.find(["nothing://x"])


def test_folders_are_read_in_an_order_of_their_own_and_say_what_they_leave_out(tmp_path):
    for name in ("b.txt", "a.py", "sub/c.md", ".hidden/d.txt", "__pycache__/e.py", "image.png", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, left_out = sources.find([tmp_path])
    names = [Path(source.path).name for source in found]
    assert sorted(names) == ["a.py", "b.txt", "c.md"] and left_out == {".png": 1, "Makefile": 1}
    assert [Path(source.path).name for source in sources.find([f"file://{tmp_path}"])[0]] == names
    (tmp_path / "more.txt").write_text("more")
    more = [Path(source.path).name for source in sources.find([tmp_path])[0]]
    assert [name for name in more if name != "more.txt"] == names
    before = sources.find([tmp_path])[0]
    (tmp_path / "a.py").write_text("A.py")
    assert sources.find([tmp_path])[0] != before


def test_places_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.xls").touch()
    (tmp_path / "a.txt").write_text("a")
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "dict")
    for place, message in {
        "nothing": "there is no such file or folder",
        "empty": "holds no .jsonl, .json, .parquet, .csv, .warc, .txt or code",
        "table.xls": "its name says no known kind",
        "dict": "a data set with splits; name one of them, as",
    }.items():
        with pytest.raises(UserError, match=f"SOURCE {tmp_path}/{place}: {message}"):
            sources.find([tmp_path / place])
    with pytest.raises(UserError, match=r"a\.txt: is named twice"):
        sources.find([tmp_path / "a.txt", tmp_path / "a.txt"])
    assert read(tmp_path / "dict/train") == ["a"]


def test_standard_library_is_read_without_its_tests_and_tables():
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    names = [Path(source.path).relative_to(library).as_posix() for source in sources.python_library()]
    assert "argparse.py" in names and "email/message.py" in names and len(names) > 300
    assert not [name for name in names if "site-packages" in name or "/test" in name or "_sysconfig" in name]


def test_documents_are_counted_as_they_come(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\nbad\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(b"\0")
    [task] = readers.tasks(sources.find([path, tmp_path / "b.txt"])[0])
    part, total = parts.Counts(), parts.Counts()
    assert list(parts.documents(task, small.options(), part)) == ["a", "b"]
    for _ in range(2):
        total.add(copy.deepcopy(part), 4)
    assert (total.empty, total.bad_count, total.rows[str(path)]) == (2, 4, 8)
    places = [{name: bad[name] for name in bad if name != "why"} for bad in total.bad]
    binary = {"file": str(tmp_path / "b.txt")}
    assert places == [{"file": str(path), "line": 3}, binary, {"file": str(path), "line": 7}, binary]
    with pytest.raises(UserError, match=r"a\.jsonl line 3: Expecting value: .*; fix it, or pass --max-bad N"):
        total.add(part, 4)
