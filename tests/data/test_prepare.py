"""router-upcycle prepare-data: Megatron's data holds what the tokenizer itself says, however the run went."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from megatron_router_upcycling.data import parts, record
from megatron_router_upcycling.data.tokenizer import load, train
from tests.data import small

FILES = (".bin", ".idx", ".json", "_held_out.bin", "_held_out.idx", "_held_out.json")
CLI = (sys.executable, "-m", "megatron_router_upcycling.cli", "prepare-data")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small.hugging_face(tmp_path_factory.mktemp("tokenizer") / "qwen")


def megatron_tokenizer(kind: str, place: Path):
    """The tokenizer as Megatron builds it for training, and for its own preprocessing."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    entries = dict.fromkeys(
        ("chat_template", "special_tokens", "metadata_path", "vocab_file", "merge_file"), None
    ) | dict.fromkeys(
        ("pad_vocab_size", "tokenizer_sentencepiece_legacy", "tokenizer_hf_no_use_fast", "trust_remote_code",
         "tokenizer_hf_no_include_special_tokens"), False
    )  # fmt: skip
    args = types.SimpleNamespace(
        tokenizer_type=kind,
        tokenizer_model=str(place),
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        **entries,
    )
    return build_tokenizer(args)


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_encoders_give_what_the_tokenizer_gives(tokenizer_class, tmp_path):
    place = small.hugging_face(tmp_path / "tokenizer", tokenizer_class)
    ours, own = load(place), AutoTokenizer.from_pretrained(place)
    texts = small.documents(60)
    assert [list(ids) for ids in ours.encoder().encode(texts)] == [own.encode(text) for text in texts]
    assert (ours.vocab_size, ours.end_of_document) == (len(own), own.eos_token_id)


def test_documents_are_what_the_tokenizer_gives(tokenizer, tmp_path):
    place = tokenizer
    texts = small.documents(90)
    first = small.lines(tmp_path / "first.jsonl", [*texts[:50], ""])
    with first.open("a") as file:
        file.write('{"text": null}\nnot JSON\n')
    table = pyarrow.table({"text": texts[50:]})
    pyarrow.parquet.write_table(table, tmp_path / "second.parquet")
    (tmp_path / "last.txt").write_text("a whole file\n")
    out = tmp_path / "out/data"
    sources = (first, tmp_path / "second.parquet", tmp_path / "last.txt")
    options = ("--tokenizer", place, "--output", out, "--held-out", 0.3, "--workers", 2)
    assert small.run(*sources, *options, "--max-bad", 2) == 0

    own, theirs = AutoTokenizer.from_pretrained(place), megatron_tokenizer("HuggingFaceTokenizer", place)
    wanted: dict[bool, list[list[int]]] = {False: [], True: []}
    texts.append("a whole file\n")
    for text in texts:
        tokens = own.encode(text)
        assert tokens == theirs.tokenize(text)
        wanted[parts.is_held_out(text, 0.3, 0)].append([*tokens, theirs.eod])
    found = {
        side: small.tokens_in(out.with_name(name))
        for side, name in ((False, "data"), (True, "data_held_out"))
    }
    assert found == wanted and wanted[True]

    for side, name in ((False, "data"), (True, "data_held_out")):
        made = record.read(out.with_name(name))
        assert made and made.documents == len(wanted[side]) and made.tokens == sum(map(len, wanted[side]))
        sizes = [len(text.encode()) for text in texts if parts.is_held_out(text, 0.3, 0) == side]
        assert made.bytes == sum(sizes) and made.longest_document == max(map(len, wanted[side]))
        assert made.vocab_size == theirs.vocab_size and made.end_of_document == theirs.eod
        assert (made.dtype, made.empty, made.skipped_count) == ("uint16", 1, 2)
        assert [(bad["file"], bad["line"]) for bad in made.skipped] == [(str(first), 52), (str(first), 53)]
        assert made.skipped[0]["why"] == "its 'text' is null, not a text"
        assert made.tokenizer_sha256 == load(place).sha256
    assert small.left_beside(out) == sorted("data" + name for name in FILES)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Lines that fill some ten parts."""
    return small.lines(tmp_path_factory.mktemp("text") / "texts.jsonl", small.documents(3200))


def flags(texts: Path, tokenizer: Path, out: Path) -> tuple[str, ...]:
    return (str(texts), "--tokenizer", str(tokenizer), "--output", str(out), "--held-out", "0.1")


def stop_after(count: int, how: int, command: tuple[str, ...], out: Path) -> subprocess.CompletedProcess[str]:
    """Run until so many parts are done, then send the signal."""
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = out.with_name(f".{out.name}.parts")
    while len(list(folder.glob("*.part"))) < count and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    said, wrong = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, said, wrong)


def test_a_stopped_run_goes_on_and_ends_the_same(texts, tokenizer, tmp_path):
    whole, out = tmp_path / "whole/data", tmp_path / "stopped/data"
    assert small.run(*flags(texts, tokenizer, whole), "--workers", 1) == 0

    command = (*CLI, *flags(texts, tokenizer, out))
    killed = stop_after(2, signal.SIGKILL, (*command, "--workers", "3"), out)
    assert killed.returncode == -signal.SIGKILL and ".data.parts" in small.left_beside(out)
    before = {path.name: path.stat().st_mtime_ns for path in (out.parent / ".data.parts").glob("*.part")}
    ended = stop_after(len(before) + 2, signal.SIGTERM, (*command, "--workers", "2"), out)
    assert (
        ended.returncode == 143 and ended.stderr.startswith("interrupted; ") and ended.stderr.count("\n") == 1
    )
    assert "the same command goes on from there" in ended.stderr and "Traceback" not in ended.stderr
    now = {path.name: path.stat().st_mtime_ns for path in (out.parent / ".data.parts").glob("*.part")}
    assert before.items() < now.items()

    assert small.run(*flags(texts, tokenizer, out), "--workers", 2) == 0
    assert small.left_beside(out) == sorted("data" + name for name in FILES)
    for name in FILES:
        made = [prefix.with_name(prefix.name + name).read_bytes() for prefix in (whole, out)]
        assert made[0] == made[1], name
    read = record.read(whole)
    assert read and read.documents + record.read(whole.with_name("data_held_out")).documents == 3200


def test_parts_of_other_text_or_options_are_not_used(texts, tokenizer, tmp_path):
    out = tmp_path / "data"
    copied = tmp_path / "texts.jsonl"
    copied.write_bytes(texts.read_bytes())
    stop_after(2, signal.SIGKILL, (*CLI, *flags(copied, tokenizer, out)), out)
    small.lines(copied, ["another text"] * 3 + ["held out"] * 3)
    assert small.run(copied, "--tokenizer", tokenizer, "--output", out) == 0
    own = AutoTokenizer.from_pretrained(tokenizer)
    wanted = [[*own.encode(text), own.eos_token_id] for text in ["another text"] * 3 + ["held out"] * 3]
    assert small.tokens_in(out) == wanted

    # What is there stays, until it is to be replaced by something whole.
    (tmp_path / "bad.jsonl").write_text("no JSON")
    again = ("--tokenizer", tokenizer, "--output", out)
    assert small.run(copied, *again) == 2
    assert small.run(tmp_path / "bad.jsonl", *again, "--overwrite") == 2
    assert small.tokens_in(out) == wanted
    limited = ("--overwrite", "--max-tokens", len(wanted[0]) * 2, "--no-end-of-document")
    assert small.run(copied, *again, *limited) == 0
    assert small.tokens_in(out) == [wanted[0][:-1]] * 2
    made = record.read(out)
    assert made and made.end_of_document is None and made.tokens == 2 * (len(wanted[0]) - 1)


def test_a_tokenizer_is_trained_on_the_text(tmp_path):
    out, folder = tmp_path / "corpus/data", tmp_path / "texts"
    folder.mkdir()
    texts = small.documents(60)[2:4] + [
        text for text in small.documents(60) if "\0" not in text and text.strip()
    ]
    for number, text in enumerate(texts := sorted(set(texts))):
        (folder / f"{number}.txt").write_bytes(text.encode())
    sizes = sum(len(text.encode()) for text in texts)
    options = (folder, "--train-tokenizer", 400, "--output", out, "--held-out", 0.2)
    assert small.run(*options, "--max-bytes", sizes) == 0
    model = tmp_path / "corpus/data.tokenizer.model"
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", model)
    assert tokenizer.vocab_size == 400
    found = {}
    for prefix in (out, out.with_name("data_held_out")):
        rows = small.tokens_in(prefix)
        assert all(row[-1] == tokenizer.eod and tokenizer.eod not in row[:-1] for row in rows)
        found[prefix.name] = [tokenizer.detokenize(row[:-1]) for row in rows]
        assert all(
            tokenizer.tokenize(text) == row[:-1] for text, row in zip(found[prefix.name], rows, strict=True)
        )
        made = record.read(prefix)
        assert made and made.tokenizer == str(model) and made.tokenizer_sha256 == load(model).sha256
    assert sorted(found["data"] + found["data_held_out"]) == texts
    assert not set(found["data"]) & set(found["data_held_out"]) and found["data"] and found["data_held_out"]


def test_a_tokenizer_is_trained_on_the_first_lines_of_a_long_text(tmp_path, monkeypatch):
    lines = [line for line in Path(__file__).read_text().splitlines() if line]
    monkeypatch.setattr("megatron_router_upcycling.data.tokenizer.TRAINING_LINES", len(lines) // 2)
    whole, first = tmp_path / "whole", tmp_path / "first"
    train(iter(lines), 400, whole)
    train(iter(lines[: len(lines) // 2]), 400, first)
    assert whole.read_bytes() == first.read_bytes()


MISTAKES = {
    "null": (["null.jsonl"], "null.jsonl line 2: its 'text' is null, not a text; mend it, or pass"),
    "surrogate": (["surrogate.jsonl"], "surrogate.jsonl line 2: has a lone surrogate"),
    "too many": (["bad.jsonl", "--max-bad", 1], "bad.jsonl line 2: is no JSON: Expecting value at"),
    "binary": (["binary.txt"], "binary.txt: is binary"),
    "cut gz": (["cut.jsonl.gz"], "cut.jsonl.gz: cannot be read, or is cut short or damaged"),
    "no column": (["a.parquet", "--text-key", "body"], "a.parquet: has no column 'body'"),
    "nothing in it": (["blank.jsonl"], "no document was found in 1 files (3 are empty)"),
    "share": (["good.jsonl", "--held-out", 1], "--held-out 1.0: must be from 0"),
    "too few tokens": (["good.jsonl", "--max-tokens", 1], "the text that SOURCE, --max-tokens and"),
    "workers": (["good.jsonl", "--workers", 0], "--workers 0: must be at least 1"),
    "no source": ([], "SOURCE: name files or folders"),
    "two tokenizers": (["good.jsonl", "--train-tokenizer", 300], "--tokenizer: name one"),
    "training": (["null.jsonl", "--train-tokenizer", 300], "null.jsonl line 2: its 'text' is null"),
    "too large": (["good.jsonl", "--train-tokenizer", 40000], "--train-tokenizer 40000: does not suit"),
    "no tokenizer": (["good.jsonl", "--tokenizer", "{folder}"], "holds none of tokenizer.json"),
    "other model": (["good.jsonl", "--tokenizer", "{folder}/good.jsonl"], "is no model of sentencepiece"),
    "a folder": (["good.jsonl", "--output", "{folder}"], "is a folder; add the name"),
    "itself": (["own.json", "--output", "{folder}/own", "--overwrite"], "own.json is one of the sources"),
    "others' data": (["good.jsonl", "--output", "{folder}/other", "--overwrite"], "has no record"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = [json.dumps({"text": f"good {number}"}) for number in range(3)]
    for name, line in {"null": '{"text": null}', "surrogate": '{"text": "\\ud800"}', "bad": "x"}.items():
        (folder / f"{name}.jsonl").write_text("\n".join([good[0], line, line, *good]))
    (folder / "good.jsonl").write_text("\n".join(good))
    (folder / "blank.jsonl").write_text('\n{"text": ""}\n  \n')
    (folder / "own.json").write_text("[]")
    (folder / "binary.txt").write_bytes(b"\0\1\2")
    (folder / "other.bin").write_bytes(b"")
    import gzip

    noise = random.Random(0).randbytes(200_000).hex()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": noise}).encode())[:-50_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "a.parquet")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(name, tokenizer, bad_folder, capfd):
    words, message = MISTAKES[name]
    words = [word.format(folder=bad_folder) if isinstance(word, str) else word for word in words]
    if words and (bad_folder / str(words[0])).exists():
        words[0] = bad_folder / words[0]
    given = set(words)
    if "--tokenizer" not in given and ("--train-tokenizer" not in given or name == "two tokenizers"):
        words += ["--tokenizer", tokenizer]
    words += [] if "--output" in given else ["--output", bad_folder / "new/data"]
    words += [] if "--workers" in given else ["--workers", 1]
    before = sorted(bad_folder.rglob("*"))
    assert small.run(*words) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert sorted(bad_folder.rglob("*")) == before


@pytest.mark.parametrize(
    "room",
    [
        pytest.param(200_000, id="for no part"),
        pytest.param(600_000, id="for parts only", marks=pytest.mark.slow),  # Megatron's writer has to start
    ],
)
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(room, texts, tokenizer, tmp_path):
    """The system refuses a file's growth as it does on a full disk, in all processes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    out = tmp_path / "new/data"
    command = (*CLI, *flags(texts, tokenizer, out), "--workers", "2")
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert (
        ended.returncode == 2 and ended.stderr.startswith("error: --output") and ended.stderr.count("\n") == 1
    )
    assert "File too large" in ended.stderr and list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_is_told_and_its_parts_are_kept(texts, tokenizer, tmp_path):
    out = tmp_path / "data"
    command = (*CLI, *flags(texts, tokenizer, out), "--workers", "1")
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = tmp_path / ".data.parts"
    while not list(folder.glob("*.part")) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    _, wrong = process.communicate(timeout=60)
    assert process.returncode == 2 and wrong.startswith(
        "error: --workers: one ended by signal 9, perhaps since"
    )
    assert wrong.count("\n") == 1 and list(folder.glob("*.part"))
