"""Text into what Megatron trains on: a sentencepiece tokenizer and .bin/.idx data with held-out documents.

    .venv/bin/python tools/experiments/corpus.py --output demo/corpus
    .venv/bin/python tools/experiments/corpus.py --output my_corpus --source my_texts --vocab-size 32000

Without ``--source`` the text is the Python standard library, which every machine has. A document is a .txt
or .py file, or a line of a .jsonl file (its "text" entry). The output folder holds:

    tokenizer.model              --tokenizer-type SentencePieceTokenizer --tokenizer-model DIR/tokenizer.model
    train.bin, train.idx         --train-data-path DIR/train
    held_out.bin, held_out.idx   --valid-data-path DIR/held_out
    corpus.json                  the options, what was read, and the counts

The same text and options give the same bytes, and a second run does nothing. The folder appears whole or
not at all.
"""

import argparse
import hashlib
import json
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_router_upcycling.errors import UserError

RECORD = "corpus.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "held_out")
SUFFIXES = (".txt", ".py", ".jsonl")
# In the standard library: tests, other people's packages, tables of characters, what a build wrote.
SKIPPED_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__")
SKIPPED_PREFIX = "_sysconfigdata"
# Lines from which the tokenizer is trained, at most: sentencepiece holds them in memory.
TOKENIZER_LINES = 2_000_000


@dataclass(frozen=True)
class Options:
    """What decides the output, besides the text itself."""

    source: str
    vocab_size: int
    max_bytes: int | None
    held_out_fraction: float
    seed: int


def source_files(source: Path, skip: bool = False) -> list[Path]:
    """The files of text in ``source`` (a folder, or one file), in an order fixed by their names' hashes.

    That order makes the first ``--max-bytes`` an even sample rather than the names that begin with "a".
    ``skip`` leaves out what of the standard library is not worth learning from.

    Raises:
        UserError: there is no such file or folder, or nothing usable in it.
    """
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise UserError(f"--source {source}: give a {', '.join(SUFFIXES)} file, or a folder of them")
        return [source]
    if not source.is_dir():
        raise UserError(f"--source {source}: there is no such file or folder")
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in SUFFIXES}
    if skip:
        names = {
            name
            for name in names
            if name.endswith(".py")
            and not set(name.split("/")) & set(SKIPPED_FOLDERS)
            and not name.startswith(SKIPPED_PREFIX)
        }
    if not names:
        raise UserError(f"--source {source}: holds no {', '.join(SUFFIXES)} files")
    return [source / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


def read_documents(files: Iterable[Path], max_bytes: int | None) -> Iterator[str]:
    """The documents of ``files`` in order, until the next one would exceed ``max_bytes`` of UTF-8.

    Raises:
        UserError: a file is not UTF-8, or a line of a .jsonl file has no "text" entry.
    """
    left = max_bytes
    for path in files:
        for text in _documents_of(path):
            size = len(text.encode())
            if left is not None:
                if size > left:
                    return
                left -= size
            if text:
                yield text


def _documents_of(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield str(json.loads(line)["text"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise UserError(
                        f'{path} line {number}: is not a JSON object with a "text" entry'
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is kept from training: decided by its own text alone.

    So a document stays where it is when others come or go, and copies of it never fall on both sides.
    """
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def train_tokenizer(documents: Iterable[str], vocab_size: int, model_file: Path) -> None:
    """Train a byte-pair tokenizer that gives every text back exactly, indentation and line ends included.

    Raises:
        UserError: the text is too small for ``vocab_size`` pieces, or these are too few for its characters.
    """
    import sentencepiece

    lines = (line for text in documents for line in text.split("\n") if line)
    try:
        with model_file.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                pad_id=3,  # beside unk 0, bos 1 and eos 2; eos is Megatron's end of document
                input_sentence_size=TOKENIZER_LINES,
                shuffle_input_sentence=False,
                num_threads=1,
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or "sentencepiece gives no reason"
        raise UserError(f"--vocab-size {vocab_size}: does not suit this text: {reason}") from None


def write_split(documents: Iterable[str], prefix: Path, model_file: Path) -> dict:
    """Write ``prefix``.bin and .idx, each document ended by the end-of-document token; return the counts
    and a digest of the text."""
    import numpy
    import sentencepiece

    with warnings.catch_warnings():  # about GPU libraries that are not there: nothing to do with data
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import (
            DType,
            IndexedDatasetBuilder,
            get_bin_path,
            get_idx_path,
        )

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    dtype = DType.optimal_dtype(tokenizer.get_piece_size())
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    counts = {"documents": 0, "bytes": 0, "tokens": 0}
    digest = hashlib.sha256()
    for text in documents:
        tokens = tokenizer.encode(text) + [tokenizer.eos_id()]
        builder.add_document(numpy.array(tokens, dtype=dtype), [len(tokens)])
        digest.update(text.encode() + b"\0")
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(tokens)
    builder.finalize(get_idx_path(str(prefix)))
    return {**counts, "text_sha256": digest.hexdigest()}


def state_of(files: Iterable[Path]) -> str:
    """A digest that changes when a file of the source is added, removed or written (by size and time)."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def prepare(output: Path, options: Options, files: list[Path], overwrite: bool, quiet: bool) -> dict:
    """Make the corpus in ``output`` unless it is there already; return its record.

    Raises:
        UserError: ``output`` holds something else, or the text cannot be used (see the functions above).
    """
    state = state_of(files)
    record = _record_of(output)
    if record is not None and record["options"] == asdict(options) and record["source_state"] == state:
        return record
    if output.exists() and any(output.iterdir()):
        if record is None:
            raise UserError(f"--output {output}: is a folder with other things in it; give another one")
        if not overwrite:
            raise UserError(f"--output {output}: holds a corpus of other text or options; add --overwrite")

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        record = {"options": asdict(options), "source_state": state, **_write(partial, options, files, quiet)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _write(folder: Path, options: Options, files: list[Path], quiet: bool) -> dict:
    """Write tokenizer and splits into ``folder``; return what is to be recorded about them."""

    def side(text: str) -> str:
        return "held_out" if is_held_out(text, options.held_out_fraction, options.seed) else "train"

    def documents(split: str, label: str) -> Iterator[str]:
        total = min(sum(path.stat().st_size for path in files), options.max_bytes or sys.maxsize)
        with tqdm(
            total=total, desc=label, unit="B", unit_scale=True, disable=quiet or None, leave=False
        ) as bar:
            for text in read_documents(files, options.max_bytes):
                if side(text) == split:
                    yield text
                bar.update(len(text.encode()))

    for name in SPLITS:
        if not any(side(text) == name for text in read_documents(files, options.max_bytes)):
            raise UserError(
                f"--held-out-fraction {options.held_out_fraction} of the text that --source and --max-bytes"
                f" leave: no document for {name}; more text or another fraction would do"
            )
    model_file = folder / TOKENIZER
    train_tokenizer(documents("train", "tokenizer"), options.vocab_size, model_file)
    return {
        "splits": {name: write_split(documents(name, name), folder / name, model_file) for name in SPLITS}
    }


def _record_of(output: Path) -> dict | None:
    """The record of a whole corpus in ``output``, or None."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    files = [TOKENIZER, *(f"{name}.{kind}" for name in SPLITS for kind in ("bin", "idx"))]
    return record if all((output / name).is_file() for name in files) else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a tokenizer on text and write Megatron's .bin/.idx data with held-out documents."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--source", type=Path, help="folder or file of .txt, .py or .jsonl (default: the standard library)"
    )
    parser.add_argument("--vocab-size", type=int, default=4000, help="pieces of the tokenizer (4000)")
    parser.add_argument("--max-bytes", type=int, help="stop reading before this much text (default: no end)")
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="of the documents (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="chooses which documents are held out (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of other text or options")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.held_out_fraction < 1:
            raise UserError(f"--held-out-fraction {args.held_out_fraction}: must be between 0 and 1")
        if args.max_bytes is not None and args.max_bytes <= 0:
            raise UserError(f"--max-bytes {args.max_bytes}: must be positive")
        source = args.source or Path(sysconfig.get_path("stdlib"))
        options = Options(
            source=str(source.resolve()),
            vocab_size=args.vocab_size,
            max_bytes=args.max_bytes,
            held_out_fraction=args.held_out_fraction,
            seed=args.seed,
        )
        files = source_files(source, skip=args.source is None)
        record = prepare(args.output, options, files, args.overwrite, args.quiet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in SPLITS:
        count = record["splits"][name]
        print(
            f"{args.output / name}: {count['documents']:,} documents, {count['bytes']:,} bytes,"
            f" {count['tokens']:,} tokens"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
