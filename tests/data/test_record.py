"""data/record.py: what is written is read again."""

import json

import pytest

from megatron_router_upcycling.data import record
from megatron_router_upcycling.errors import UserError

RECORD = record.Record(
    documents=3, tokens=10, bytes=35, bytes_per_token=3.5, longest_document=6, vocab_size=300,
    tokenizer="/models/tokenizer", tokenizer_sha256="ab" * 32, dtype="uint16", end_of_document=None, empty=0,
    skipped_count=1, skipped=[{"file": "naïve.jsonl", "line": 3, "why": "is no JSON"}], left_out={".png": 2},
    options={"seed": 0}, versions={"python": "3.12"},
)  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path):
    prefix = tmp_path / "data.v1"
    assert record.read(prefix) is None
    RECORD.write(prefix)
    assert record.read(prefix) == RECORD and record.path_of(prefix) == tmp_path / "data.v1.json"


def test_what_is_no_record_is_refused(tmp_path):
    RECORD.write(tmp_path / "data")
    path = tmp_path / "data.json"
    whole = json.loads(path.read_text())
    changed = {
        json.dumps(whole | {name: value}): message
        for name, value, message in (
            ("format", 3, "is of format 3, and this version reads 1 and 2"),
            ("vocab_size", "300", "vocab_size is 300"),
            ("tokens", True, "tokens is True"),
            ("tokenizer_sha256", None, "tokenizer_sha256 is None"),
        )
    }
    for content in ("", "[]", "{", "[" * 100_000, '{"format": 1}', "\ud800", *changed):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        wanted = rf"data\.json: is no record of prepare-data .*{changed.get(content, '')}"
        with pytest.raises(UserError, match=wanted):
            record.read(tmp_path / "data")
