"""router-upcycle prepare-data: Megatron's data holds what the tokenizer itself says, however the run went."""

import collections
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from megatron_router_upcycling.data import parts, publish, record
from megatron_router_upcycling.data.tokenizer import load, train
from tests.data import small

FILES = (".bin", ".idx", ".json", "_held_out.bin", "_held_out.idx", "_held_out.json")
# The command with small tasks, so that a small text has many.
COMMAND = (
    "import sys; from megatron_router_upcycling import cli\n"
    "from megatron_router_upcycling.data import readers as r; r.SMALLEST_TASK = 1 << 19; sys.exit(cli.main())"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small.hugging_face(tmp_path_factory.mktemp("tokenizer") / "qwen")


def megatron_tokenizer(kind: str, place: Path):
    """The tokenizer as Megatron builds it for training, and for its own preprocessing."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = collections.defaultdict(lambda: None, tokenizer_type=kind, tokenizer_model=str(place))
    args["tokenizer_sentencepiece_ignore_extra_whitespaces"] = True
    own = type("Arguments", (), {"__getattr__": lambda _, name: args[name]})  # most are not set
    return build_tokenizer(own())


def built_by_megatron(prefix: Path, documents: list[list[int]]) -> tuple[bytes, bytes]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for tokens in documents:
        builder.add_document(numpy.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def test_files_are_those_of_the_tokenizer_and_megatrons_builder(tokenizer, tmp_path):
    texts = small.documents(90)
    first = small.lines(tmp_path / "first.jsonl", [*texts[:50], ""])
    with first.open("a") as file:
        file.write('{"text": null}\nnot JSON\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[50:]}), tmp_path / "second.parquet")
    (tmp_path / "last.txt").write_text("a whole file\n")
    texts.append("a whole file\n")
    out = tmp_path / "out/data"
    sources = (first, tmp_path / "second.parquet", tmp_path / "last.txt")
    options = ("--tokenizer", tokenizer, "--output", out, "--held-out", 0.3, "--workers", 2)
    assert small.run(*sources, *options, "--max-bad", 2) == 0

    theirs = megatron_tokenizer("HuggingFaceTokenizer", tokenizer)
    for side, name in ((False, "data"), (True, "data_held_out")):
        mine = [text for text in texts if parts.is_held_out(text, 0.3, 0) == side]
        wanted = [[*theirs.tokenize(text), theirs.eod] for text in mine]
        prefix = out.with_name(name)
        assert small.tokens_in(prefix) == wanted and wanted
        files = tuple(prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx"))
        assert files == built_by_megatron(tmp_path / f"built_{name}", wanted)
        made = record.read(prefix)
        assert made and made.documents == len(wanted) and made.tokens == sum(map(len, wanted))
        sizes = [len(text.encode()) for text in mine]
        assert made.bytes == sum(sizes) and made.longest_document == max(map(len, wanted))
        assert made.vocab_size == theirs.vocab_size and made.end_of_document == theirs.eod
        assert (made.dtype, made.empty, made.skipped_count) == ("uint16", 1, 2)
        assert [(bad["file"], bad["line"]) for bad in made.skipped] == [(str(first), 52), (str(first), 53)]
        assert made.skipped[0]["why"] == "has no text 'text'; see --text-key"
        assert made.tokenizer_sha256 == load(tokenizer).sha256
    assert small.left_beside(out) == sorted("data" + name for name in FILES)

    without = (*sources, "--tokenizer", tokenizer, "--output", out, "--max-bad", 2)
    assert small.run(*without, "--overwrite") == 0  # what was held out goes with the old data
    assert small.left_beside(out) == ["data.bin", "data.idx", "data.json"]
    record.path_of(out).unlink()
    assert small.run(*without, "--overwrite") == 2
    out.with_name(".data.parts").mkdir()
    out.with_name(".data.parts").joinpath("publishing").touch()  # a run was killed while it gave names
    assert small.run(*without) == 0 and small.left_beside(out) == ["data.bin", "data.idx", "data.json"]


def test_a_share_is_held_out_by_the_hash_of_seed_and_text():
    texts = [f"naïve {number}" for number in range(1000)]
    digests = (hashlib.sha256(f"7:{text}".encode()).hexdigest() for text in texts)
    wanted = [int(digest[:16], 16) / 2**64 < 0.2 for digest in digests]
    assert [parts.is_held_out(text, 0.2, 7) for text in texts] == wanted and 150 < sum(wanted) < 250
    assert not any(parts.is_held_out(text, 0.0, 7) for text in texts)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """One file of lines for some ten tasks, with two bad ones far in."""
    path = small.lines(tmp_path_factory.mktemp("text") / "texts.jsonl", small.documents(3000))
    with path.open("a") as file:
        file.write('bad\n{"text": "good"}\n{}\n')
    return path


def command(texts: Path, tokenizer: Path, out: Path, workers: int) -> tuple[str, ...]:
    options = ("--held-out", "0.1", "--max-bad", "2", "--workers", str(workers))
    start = (sys.executable, "-c", COMMAND, "prepare-data", str(texts))
    return (*start, "--tokenizer", str(tokenizer), "--output", str(out), *options)


@pytest.fixture(scope="module")
def whole(texts, tokenizer, tmp_path_factory) -> Path:
    """What an unbroken run with one worker makes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    done = subprocess.run(command(texts, tokenizer, out, 1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "2 bad documents skipped" in done.stdout and not done.stderr, done.stderr
    return out


def stop_after(count: int, how: int, words: tuple[str, ...], out: Path, workers: bool = False):
    """Run until so many parts are done, then send the signal to the command, or to its workers."""
    process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(done_parts(out)) < count and process.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in map(int, children) if workers else [process.pid]:
        os.kill(number, how)
    said, wrong = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, said, wrong)


def done_parts(out: Path) -> dict[str, int]:
    folder = out.with_name(f".{out.name}.parts") / "tasks/completions"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(texts, tokenizer, whole, tmp_path):
    out = tmp_path / "data"
    for count, workers in ((1, 3), (4, 2), (6, 1)):
        killed = stop_after(count, signal.SIGKILL, command(texts, tokenizer, out, workers), out)
        assert killed.returncode == -signal.SIGKILL and len(done_parts(out)) >= count
    before = done_parts(out)
    ended = stop_after(len(before) + 1, signal.SIGTERM, command(texts, tokenizer, out, 2), out)
    assert ended.returncode == 143 and ended.stderr.startswith("interrupted; ")
    assert ended.stderr.count("\n") == 1
    assert "run the same command again to resume" in ended.stderr
    assert before.items() < done_parts(out).items()

    done = subprocess.run(command(texts, tokenizer, out, 2), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert small.left_beside(out) == sorted("data" + name for name in FILES)
    for name in FILES:
        made = [prefix.with_name(prefix.name + name).read_bytes() for prefix in (whole, out)]
        assert made[0] == made[1], name
    read = record.read(whole)
    assert read and read.documents + record.read(whole.with_name("data_held_out")).documents == 3001
    assert [bad["line"] for bad in read.skipped] == [3001, 3003]


def test_a_worker_that_is_killed_is_said_and_finished_parts_are_kept(texts, tokenizer, whole, tmp_path):
    out = tmp_path / "data"
    words = command(texts, tokenizer, out, 1)
    killed = stop_after(1, signal.SIGKILL, words, out, workers=True)
    assert killed.returncode == 2 and killed.stderr.startswith("error: --workers: one was killed, perhaps")
    assert killed.stderr.count("\n") == 1 and done_parts(out)
    assert subprocess.run(words, capture_output=True, timeout=200).returncode == 0
    assert out.with_suffix(".bin").read_bytes() == whole.with_suffix(".bin").read_bytes()


def test_limits_end_the_text_and_the_tasks(texts, tokenizer, whole, tmp_path):
    limit, out = 100_000, tmp_path / "data"
    words = (*command(texts, tokenizer, out, 1), "--max-tokens", str(limit))
    assert subprocess.run(words, capture_output=True, timeout=200).returncode == 0
    made = [record.read(out), record.read(out.with_name("data_held_out"))]
    tokens = sum(one.tokens for one in made)
    for name, one in zip(("data", "data_held_out"), made, strict=True):
        start = small.tokens_in(whole.with_name(name))[: one.documents + 1]
        assert small.tokens_in(out.with_name(name)) == start[:-1]
    assert publish.fitting(numpy.array([[3, 9, 0], [2, 9, 1]]), [], small.options(max_tokens=5)) == 2
    longest = max(one.longest_document for one in made)
    assert limit - longest < tokens <= limit and made[0].skipped_count == 0  # the bad ones come later


def test_parts_of_other_text_or_options_are_not_used_and_nothing_is_overwritten(texts, tokenizer, tmp_path):
    out, copied = tmp_path / "data", tmp_path / "texts.jsonl"
    copied.write_bytes(texts.read_bytes())
    stop_after(2, signal.SIGKILL, command(copied, tokenizer, out, 2), out)
    small.lines(copied, ["another text"] * 3 + ["held out"] * 3)
    again = ("--tokenizer", tokenizer, "--output", out)
    assert small.run(copied, *again) == 0
    own = AutoTokenizer.from_pretrained(tokenizer)
    wanted = [[*own.encode(text), own.eos_token_id] for text in ["another text"] * 3 + ["held out"] * 3]
    assert small.tokens_in(out) == wanted

    (tmp_path / "bad.jsonl").write_text("no JSON")
    assert small.run(copied, *again) == 2
    assert small.run(tmp_path / "bad.jsonl", *again, "--overwrite") == 2
    assert small.tokens_in(out) == wanted
    limited = ("--overwrite", "--max-bytes", 25, "--no-end-of-document")
    assert small.run(copied, *again, *limited) == 0
    assert small.tokens_in(out) == [wanted[0][:-1]] * 2
    made = record.read(out)
    assert made and made.end_of_document is None and made.bytes == 24
    assert made.bytes_per_token == pytest.approx(24 / made.tokens, abs=1e-4)


def test_a_tokenizer_is_trained_on_the_text(tmp_path):
    out, folder = tmp_path / "corpus/data", tmp_path / "texts"
    folder.mkdir()
    texts = sorted({text for text in small.documents(60) if "\0" not in text and text.strip()})
    for number, text in enumerate(texts):
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
        assert [tokenizer.tokenize(text) for text in found[prefix.name]] == [row[:-1] for row in rows]
        made = record.read(prefix)
        assert made and made.tokenizer == str(model) and made.tokenizer_sha256 == load(model).sha256
    assert sorted(found["data"] + found["data_held_out"]) == texts and all(found.values())
    assert model.read_bytes() == train(found["data"], 400)  # what is held out is not seen


def test_a_tokenizer_is_trained_on_the_first_lines_of_a_long_text(monkeypatch):
    lines = [line for line in Path(__file__).read_text().splitlines() if line]
    monkeypatch.setattr("megatron_router_upcycling.data.tokenizer.TRAINING_LINES", len(lines) // 2)
    assert train(iter(lines), 400) == train(iter(lines[: len(lines) // 2]), 400)


MISTAKES = {
    "null": (["null.jsonl"], "null.jsonl line 2: has no text 'text'; see --text-key; fix it, or pass"),
    "too many": (["bad.jsonl", "--max-bad", 1], "bad.jsonl line 2: Expecting value: line 1 column 1"),
    "cut gz": (["cut.jsonl.gz"], "cut.jsonl.gz: cannot be read, or is cut short or damaged"),
    "nothing in it": (["blank.jsonl"], "leave no document for training (3 are empty)"),
    "share": (["good.jsonl", "--held-out", 1], "--held-out 1.0: must be from 0"),
    "too few tokens": (["good.jsonl", "--max-tokens", 1], "SOURCE, --held-out, --max-tokens and"),
    "workers": (["good.jsonl", "--workers", 0], "argument --workers: 0: must be at least 1"),
    "no source": ([], "SOURCE: name files or folders"),
    "two tokenizers": (["good.jsonl", "--train-tokenizer", 300], "--tokenizer: name one"),
    "training": (["null.jsonl", "--train-tokenizer", 300], "null.jsonl line 2: has no text"),
    "too large": (["good.jsonl", "--train-tokenizer", 40000], "--train-tokenizer 40000: does not suit"),
    "no tokenizer": (["good.jsonl", "--tokenizer", "{folder}"], "is no file, and no folder with"),
    "other model": (["good.jsonl", "--tokenizer", "{folder}/good.jsonl"], "is no model of sentencepiece"),
    "a folder": (["good.jsonl", "--output", "{folder}"], "is a folder; add the name"),
    "itself": (["own.json", "--output", "{folder}/own", "--overwrite"], "own.json is one of the sources"),
    "others' data": (["good.jsonl", "--output", "{folder}/other", "--overwrite"], "other.bin exists"),
    "no partition": (["good.jsonl", "--executor", "slurm"], "--executor slurm: needs --slurm partition="),
    "not Slurm": (["good.jsonl", "--slurm", "time=1"], "--slurm: is for --executor slurm"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = [json.dumps({"text": f"good {number}"}) for number in range(3)]
    for name, line in {"null": '{"text": null}', "bad": "x"}.items():
        (folder / f"{name}.jsonl").write_text("\n".join([good[0], line, line, *good]))
    (folder / "good.jsonl").write_text("\n".join(good))
    (folder / "blank.jsonl").write_text('\n{"text": ""}\n  \n')
    (folder / "own.json").write_text("[]")
    (folder / "other.bin").write_bytes(b"")
    noise = random.Random(0).randbytes(200_000).hex()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": noise}).encode())[:-50_000])
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(name, tokenizer, bad_folder, capfd):
    words, message = MISTAKES[name]
    words = [str(word).format(folder=bad_folder) for word in words]
    if words and (bad_folder / words[0]).exists():
        words[0] = str(bad_folder / words[0])
    if "--tokenizer" not in words and ("--train-tokenizer" not in words or name == "two tokenizers"):
        words += ["--tokenizer", tokenizer]
    words += [] if "--output" in words else ["--output", bad_folder / "new/data"]
    before = sorted(bad_folder.rglob("*"))
    assert small.run(*words) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert sorted(bad_folder.rglob("*")) == before


@pytest.mark.parametrize("room", [1000, 200_000, 900_000])  # for nothing, for no part, for parts only
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(room, texts, tokenizer, tmp_path):
    """The system refuses a file's growth as it does on a full disk, in all processes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = command(texts, tokenizer, tmp_path / "new/data", 2)
    ended = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert ended.returncode == 2 and ended.stderr.startswith("error: --output")
    assert ended.stderr.count("\n") == 1
    assert "File too large" in ended.stderr and list(tmp_path.iterdir()) == []
