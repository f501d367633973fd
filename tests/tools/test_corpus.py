"""corpus.py: the text that comes back out of Megatron's readers is the text that went in."""

import json
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_router_upcycling.errors import UserError
from tools.experiments import corpus as corpus_tool

TOOL = Path(corpus_tool.__file__)
WORDS = ["def", "class", "return", "if", "else", "for", "import", "yield", "lambda", "not", "is", "None"]


def run(*flags) -> int:
    return corpus_tool.main([*map(str, flags), "--quiet"])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Forty files of made-up text, with indentation, empty lines, tabs, and characters beyond ASCII."""
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for number in range(40):
        lines = [
            "    " * draw.randrange(4) + " ".join(draw.choice(WORDS) for _ in range(draw.randrange(12)))
            for _ in range(30)
        ]
        (folder / f"part{number % 3}").mkdir(exist_ok=True)
        text = "\n".join([*lines, "", "\ttab  two  spaces", f"naïve {chr(0x4E00 + number)} 🙂", ""])
        (folder / f"part{number % 3}" / f"text{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "out"
    assert run("--output", output, "--source", source, "--vocab-size", 400, "--held-out-fraction", 0.2) == 0
    return output


def megatron_tokenizer(corpus: Path):
    """The tokenizer as `--tokenizer-type SentencePieceTokenizer` builds it."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args = types.SimpleNamespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(corpus / "tokenizer.model"),
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
    )
    return build_tokenizer(args)


def documents_in(corpus: Path, split: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus / split))
    assert len(dataset) == len(dataset.document_indices) - 1
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_every_document_comes_back_exactly_and_on_one_side(source, corpus):
    tokenizer = megatron_tokenizer(corpus)
    assert tokenizer.vocab_size == 400
    wanted = sorted(path.read_text(encoding="utf-8") for path in source.rglob("*.txt"))
    found = {}
    for split in corpus_tool.SPLITS:
        documents = documents_in(corpus, split)
        assert all(tokens[-1] == tokenizer.eod and tokenizer.eod not in tokens[:-1] for tokens in documents)
        found[split] = [tokenizer.detokenize(tokens[:-1]) for tokens in documents]
    assert sorted(found["train"] + found["held_out"]) == wanted
    assert not set(found["train"]) & set(found["held_out"])
    assert found["train"] and found["held_out"]


def test_record_counts_what_was_written(corpus):
    record = json.loads((corpus / "corpus.json").read_text())
    for split in corpus_tool.SPLITS:
        documents = documents_in(corpus, split)
        assert record["splits"][split]["documents"] == len(documents)
        assert record["splits"][split]["tokens"] == sum(map(len, documents))
    total = sum(record["splits"][split]["bytes"] for split in corpus_tool.SPLITS)
    source = Path(record["options"]["source"])
    assert total == sum(path.stat().st_size for path in source.rglob("*.txt"))


def test_same_text_gives_the_same_bytes_in_another_process(source, corpus, tmp_path):
    command = [
        sys.executable,
        TOOL,
        "--output",
        tmp_path / "again",
        "--source",
        source,
        "--vocab-size",
        "400",
    ]
    subprocess.run([*command, "--held-out-fraction", "0.2", "--quiet"], check=True, capture_output=True)
    for name in ("tokenizer.model", "train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (tmp_path / "again" / name).read_bytes() == (corpus / name).read_bytes(), name


def test_second_run_does_nothing_until_text_or_options_change(source, tmp_path, capsys):
    text, output = tmp_path / "text", tmp_path / "out"
    shutil.copytree(source, text)
    flags = ("--output", output, "--source", text, "--vocab-size", 400, "--held-out-fraction", 0.2)
    assert run(*flags) == 0
    first = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run(*flags) == 0
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == first

    (text / "more.txt").write_text("one more document\n" * 10)
    capsys.readouterr()
    assert run(*flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == first
    assert run(*flags, "--overwrite") == 0
    counts = json.loads((output / "corpus.json").read_text())["splits"]
    assert counts["train"]["documents"] + counts["held_out"]["documents"] == 41
    assert not list(tmp_path.glob("*.partial"))


def test_held_out_documents_stay_when_others_come(source):
    texts = [path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.txt"))]
    before = {text: corpus_tool.is_held_out(text, 0.3, 0) for text in texts}
    assert {True, False} == set(before.values())
    assert all(corpus_tool.is_held_out(text, 0.3, 0) == side for text, side in reversed(before.items()))
    # A larger fraction only adds documents, and another seed chooses others.
    assert all(corpus_tool.is_held_out(text, 0.5, 0) for text, side in before.items() if side)
    assert before != {text: corpus_tool.is_held_out(text, 0.3, 1) for text in texts}


def test_max_bytes_ends_the_text(source):
    files = corpus_tool.source_files(source)
    sizes = [path.stat().st_size for path in files]
    limit = sum(sizes[:7]) + 1
    assert len(list(corpus_tool.read_documents(files, limit))) == 7
    assert len(list(corpus_tool.read_documents(files, sum(sizes[:7])))) == 7
    assert len(list(corpus_tool.read_documents(files, sum(sizes[:7]) - 1))) == 6


def test_jsonl_holds_a_document_a_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\\ntwo"}\n{"text": "", "id": 1}\n{"text": "three", "id": 2}\n')
    assert list(corpus_tool.read_documents([path], None)) == ["one\ntwo", "three"]
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl line 2: .*\"text\""):
        list(corpus_tool.read_documents([path], None))


def test_standard_library_is_read_without_its_tests_and_tables():
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library).as_posix() for path in corpus_tool.source_files(library, skip=True)]
    assert "argparse.py" in names and "email/message.py" in names and len(names) > 300
    assert not [name for name in names if "site-packages" in name or "/test" in name or "_sysconfig" in name]
    assert names == [p.relative_to(library).as_posix() for p in corpus_tool.source_files(library, skip=True)]
    assert names != sorted(names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "{tmp}/nothing"], "--source"),
        (["--source", "{tmp}/empty"], "--source"),
        (["--source", "{tmp}/table.csv"], "--source"),
        (["--source", "{tmp}/latin.txt"], "latin.txt"),
        (["--source", "{source}", "--vocab-size", "40000"], "--vocab-size 40000"),
        (["--source", "{source}", "--vocab-size", "3"], "--vocab-size 3"),
        (["--source", "{source}", "--vocab-size", "400", "--held-out-fraction", "0"], "--held-out-fraction"),
        (
            ["--source", "{source}", "--vocab-size", "400", "--held-out-fraction", "1e-9"],
            "no document for held_out",
        ),
        (
            ["--source", "{source}", "--vocab-size", "400", "--held-out-fraction", "0.999999"],
            "no document for train",
        ),
        (["--source", "{source}", "--max-bytes", "0"], "--max-bytes"),
        (["--source", "{source}", "--max-bytes", "1"], "--max-bytes"),
    ],
    ids=lambda value: (
        "-".join(value[2:] or value[1:]).replace("{tmp}/", "") if isinstance(value, list) else ""
    ),
)
def test_mistakes_are_one_line_and_leave_nothing(flags, message, source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp=tmp_path, source=source) for flag in flags]
    assert run("--output", tmp_path / "out", *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_other_things_is_never_replaced(source, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("--output", tmp_path, "--source", source, "--overwrite") == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
