"""data/chunks.py, documents.py and their readers: every document of every kind of file, and what is none."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_router_upcycling.data import chunks, documents, sources
from megatron_router_upcycling.errors import UserError
from tests.data import small

TEXTS = ["one\ntwo", "", "naïve 日本語", 'quotes " and \\ back', "x" * 5000, *small.documents(40)]


def read(*places: Path, key: str = "text", longest: int = 1 << 20, size: int = 4000) -> list[str]:
    """Texts, and of bad documents what is said of them."""
    limits = documents.Limits(key, longest)
    found, _ = sources.find(places)
    return [
        str(seen) if isinstance(seen, documents.Skipped) else seen[0]
        for part in chunks.parts(found, limits, size)
        for chunk in part
        for seen in documents.read(chunk, limits)
    ]


def as_array(path: Path, texts: list[str], indent: int | None = None) -> Path:
    path.write_text(json.dumps([{"id": 1.5, "text": text} for text in texts], indent=indent))
    return path


def as_parquet(path: Path, texts: list, kind: object = None) -> Path:
    table = pyarrow.table(
        {"text": pyarrow.array(texts, kind or pyarrow.string()), "n": list(range(len(texts)))}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def as_data_set(path: Path, texts: list) -> Path:
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, num_shards=2)
    return path


def as_lines(path: Path, texts: list[str]) -> Path:
    return small.lines(path, texts)


KINDS = {
    "texts.jsonl": as_lines,
    "lines.json": as_lines,
    "array.json": as_array,
    "texts.parquet": as_parquet,
    "data_set": as_data_set,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 3000, 1 << 20])
def test_every_kind_gives_its_texts_in_order(name, size, tmp_path):
    assert read(KINDS[name](tmp_path / name, TEXTS), size=size) == TEXTS


def test_large_strings_and_arrays_with_indentation_are_read(tmp_path):
    assert read(as_parquet(tmp_path / "a.parquet", TEXTS, pyarrow.large_string())) == TEXTS
    assert read(as_array(tmp_path / "a.json", TEXTS, indent=2)) == TEXTS
    (tmp_path / "empty.json").write_text(" [ ]\n")
    assert read(tmp_path / "empty.json") == []


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_compressed_files_are_read_and_cut_ones_named(suffix, name, tmp_path):
    plain = tmp_path / name
    if name == "a.txt":
        wanted = ["\n".join(TEXTS).replace("\0", "")]
        plain.write_text(wanted[0], encoding="utf-8")
    else:
        (as_array if name == "a.json" else as_lines)(plain, TEXTS)
        wanted = TEXTS
    content = COMPRESS[suffix](plain.read_bytes())
    packed = tmp_path / (name + suffix)
    packed.write_bytes(content)
    assert read(packed) == wanted
    for damaged in (content[: len(content) // 2], b"not compressed" * 9):
        packed.write_bytes(damaged)
        if name == "a.txt":
            assert read(packed)[0].startswith(f"{packed}: cannot be read, or is cut short")
        else:
            with pytest.raises(UserError, match=rf"SOURCE {packed}: cannot be read, or is cut short"):
                read(packed)


def test_a_stream_of_several_frames_is_read_to_its_end(tmp_path):
    halves = [small.lines(tmp_path / "half.jsonl", texts).read_bytes() for texts in (TEXTS[:9], TEXTS[9:])]
    for suffix, compress in COMPRESS.items():
        packed = tmp_path / f"two.jsonl{suffix}"
        packed.write_bytes(b"".join(map(compress, halves)))
        assert read(packed) == TEXTS, suffix


def test_marks_blank_lines_and_ends_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n\t{"text": "two"}\n\n{"text": "three"}')
    assert read(path, size=5) == ["one", "", "", "two", "", "three"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read(tmp_path / "a.txt") == ["a\r\nb"]
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.json").touch()
    assert read(tmp_path / "empty.jsonl", tmp_path / "empty.json", tmp_path / "empty.txt") == [""]


BAD_LINES = {
    b'{"text": null}': "its 'text' is null, not a text",
    b'{"text": 5}': "its 'text' is a number, not a text",
    b'{"text": ["a"]}': "its 'text' is a list, not a text",
    b'{"body": "a", "id": 1}': "has no 'text', but body, id; see --text-key",
    b"[1]": "is no JSON object with a 'text' entry, but a list",
    b"nonsense": "is no JSON: Expecting value at character 1",
    b'{"text": "\\ud83d y"}': "has a lone surrogate (\\ud83d), which is half a character",
    b'{"text": "\xe9"}': "is not UTF-8: byte 11 is 0xe9",
    b"[" * 100_000: "is no JSON that can be read: nested too deep, or a number too long",
    b'{"text": 1' + b"0" * 9999 + b"}": "is no JSON that can be read: nested too deep, or a number too long",
    '{"text": "a"}'.encode("utf-16-le"): "is no JSON: it has a zero byte, as UTF-16 and binary files do",
    b'{"text": "' + b"a" * 200_000 + b'"}': "is longer than 150,000 bytes; cut it into documents, or raise"
    " --max-document-bytes",
}  # fmt: skip


@pytest.mark.parametrize("size", [64, 1 << 20])
@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_bad_lines_are_named_and_the_rest_is_read(line, size, tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    said = f"{path} line 3: {BAD_LINES[line]}"
    assert read(path, longest=150_000, size=size) == ["good", "", said, "good"]
    path.write_bytes(good + line)
    assert read(path, longest=150_000, size=size) == ["good", said.replace("line 3", "line 2")]


def test_random_lines_keep_their_numbers_however_they_are_cut(tmp_path):
    draw, path = random.Random(5), tmp_path / "a.jsonl"
    for _ in range(30):
        rows = [
            draw.choice([b'{"text": "a"}', b"", b"bad", b'{"text": "' + b"b" * 90 + b'"}']) for _ in range(20)
        ]
        path.write_bytes(b"\n".join(rows))
        wanted = read(path, longest=60, size=1 << 20)
        assert [f"{path} line {n}" in said for n, said in enumerate(wanted, 1) if "line" in said].count(
            False
        ) == 0
        for size in (1, 7, 100):
            assert read(path, longest=60, size=size) == wanted


BAD_ARRAYS = {
    b'[{"text": "a"}, {"text": "b"': "item 2 of its array is no JSON",
    b'[{"text": "a"} {"text": "b"}]': "item 2 of its array comes without a comma",
    b'[{"text": "a"},': "item 2 of its array is no JSON",
    b'[{"text": "a"}': "item 2 of its array is missing: the file ends before the array does",
    b'[{"text": "a"}] {}': "item 2 of its array is beyond the array's end",
    b'[{"text": "a"}, {"text": "\xe9"}]': "UTF-8",
    b'[{"text": "a"}, ' + b"[" * 100_000: "item 2 of its array is no JSON that can be read",
    b'[{"text": "a"}, {"text": "' + b"x" * 3_000_000: "item 2 of its array is no JSON",
}


@pytest.mark.parametrize("content", BAD_ARRAYS, ids=BAD_ARRAYS.values())
def test_damaged_arrays_are_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=BAD_ARRAYS[content]):
        read(tmp_path / "a.json")


def test_items_and_rows_without_a_text_are_named(tmp_path):
    array, table = tmp_path / "a.json", tmp_path / "a.parquet"
    array.write_text('[{"text": "a"}, {"text": null}, 7, {"text": "\\udc00"}]')
    assert read(array) == [
        "a",
        f"{array} item 2: its 'text' is null, not a text",
        f"{array} item 3: is no JSON object with a 'text' entry, but a number",
        f"{array} item 4: has a lone surrogate (\\udc00), which is half a character",
    ]
    as_parquet(table, ["a", None, "b"])
    assert read(table) == ["a", f"{table} row 2: its 'text' is null, not a text", "b"]
    broken = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), table)
    assert read(table)[1].startswith(f"{table} row 2: is not UTF-8")


def test_tables_without_the_column_are_refused(tmp_path):
    table = as_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'body', but text, n; see --text-key"):
        read(table, key="body")
    with pytest.raises(UserError, match=r"a\.parquet: its column 'n' holds int64, not texts"):
        read(table, key="n")
    with pytest.raises(UserError, match=r"data-\S+\.arrow: has no column 'body', but text"):
        read(as_data_set(tmp_path / "saved", TEXTS), key="body")
    table.write_bytes(table.read_bytes()[:500])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read, or is cut short or damaged"):
        read(table)
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:700])
    with pytest.raises(UserError, match=r"\.arrow: cannot be read, or is cut short or damaged"):
        read(tmp_path / "saved")


BAD_TEXTS = {
    "a\nnaïve".encode("latin-1"): "is not UTF-8: byte 5 is 0xef",
    "text".encode("utf-16"): "is UTF-16; convert it to UTF-8",
    b"\x7fELF\0\0": "is binary: byte 5 is zero",
    b"x" * 200: "is longer than 100 bytes",
}


@pytest.mark.parametrize("content", BAD_TEXTS, ids=BAD_TEXTS.values())
def test_bad_files_of_text_are_named(content, tmp_path):
    (tmp_path / "b.txt").write_bytes(content)
    (tmp_path / "c.txt").write_text("good")
    found = read(tmp_path / "b.txt", tmp_path / "c.txt", longest=100)
    assert found[0].startswith(f"{tmp_path}/b.txt: {BAD_TEXTS[content]}") and found[1] == "good"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_in_utf_16_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(UserError, match=f"{name}: is UTF-16; convert it to UTF-8, as with iconv"):
        read(tmp_path / name)


def test_folders_are_read_in_an_order_of_their_own_and_say_what_they_leave_out(tmp_path):
    for name in ("b.txt", "a.py", "sub/c.md", ".hidden/d.txt", "__pycache__/e.py", "image.png", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, left_out = sources.find([tmp_path])
    assert {source.path.name for source in found} == {"a.py", "b.txt", "c.md"}
    assert left_out == {".png": 1, "Makefile": 1}
    (tmp_path / "more.txt").write_text("more")
    names = [source.path.name for source in sources.find([tmp_path])[0]]
    assert [name for name in names if name != "more.txt"] == [source.path.name for source in found]
    state = sources.state_of(sources.find([tmp_path])[0])
    (tmp_path / "a.py").write_text("another text")
    assert sources.state_of(sources.find([tmp_path])[0]) != state


def test_places_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "a.txt").write_text("a")
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "dict")
    for place, message in {
        "nothing": "there is no such file or folder",
        "empty": "holds no .jsonl, .json, .parquet, .txt or code",
        "table.csv": "its name says no known kind",
        "dict": "a data set with the splits train, test; name one, as in",
    }.items():
        with pytest.raises(UserError, match=f"SOURCE {tmp_path}/{place}: {message}"):
            sources.find([tmp_path / place])
    with pytest.raises(UserError, match=r"a\.txt: is named twice"):
        sources.find([tmp_path / "a.txt", tmp_path / "a.txt"])
    assert read(tmp_path / "dict/train") == ["a"]


def test_standard_library_is_read_without_its_tests_and_tables():
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    names = [source.path.relative_to(library).as_posix() for source in sources.python_library()]
    assert "argparse.py" in names and "email/message.py" in names and len(names) > 300
    assert not [name for name in names if "site-packages" in name or "/test" in name or "_sysconfig" in name]
    assert names == [source.path.relative_to(library).as_posix() for source in sources.python_library()]
    assert names != sorted(names)
