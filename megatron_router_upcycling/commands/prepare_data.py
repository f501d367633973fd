"""Make Megatron's training data of text.

Tokenise text in parallel tasks and write Megatron's .bin and .idx, whole or not at all.

example:
  router-upcycle prepare-data texts/ more.jsonl.gz --tokenizer Qwen1.5-0.5B --held-out 0.01 \\
      --output data/texts
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config moe.yaml --load ckpt/moe \\
      --train-data-path data/texts --valid-data-path data/texts_held_out

A document is a line of .jsonl or an object of an array in .json (its --text-key entry), a row of .parquet,
of .csv or of a data set that datasets has saved, a page of .warc or .wet, or a whole file of .txt or of code.
All but .parquet may end in .gz, .bz2, .xz or .zst. SOURCE may be an address (s3://, hf://, https://).
Text is UTF-8. Blank lines and empty texts are skipped; anything else that is no document is bad: the
first one stops the command, unless --max-bad allows it.

PREFIX.bin and PREFIX.idx are written, PREFIX_held_out.bin and .idx with --held-out, PREFIX.tokenizer.model
with --train-tokenizer, and beside each .bin a .json that describes it: documents, tokens, bytes a token, the
longest document, the tokenizer's vocabulary and digest, and what was skipped and why.

A command that was killed resumes when it is run again: finished tasks are skipped, and the bytes are the
same, whatever --workers is.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from megatron_router_upcycling.commands.shared import at_least, progress_bar
from megatron_router_upcycling.config.flags import add_output
from megatron_router_upcycling.errors import UserError


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    positive = at_least(1)
    add("sources", metavar="SOURCE", nargs="*", help="a file of text, a folder, a saved data set, an address")
    add("--output", metavar="PREFIX", type=Path, required=True, help="what to make")
    add("--tokenizer", metavar="PLACE", type=Path, help="a Hugging Face folder or sentencepiece .model file")
    add("--train-tokenizer", metavar="N", type=positive, help="train one of sentencepiece with N pieces")
    add("--text-key", metavar="NAME", default="text", help="entry or column of the text")
    add("--workers", metavar="N", type=positive, help="tasks at a time (default: all cores)")
    add("--executor", choices=("local", "slurm"), default="local", help="where tasks run")
    add("--slurm", metavar="KEY=VALUE", action="append", default=[], help="option of sbatch: partition=cpu")
    add("--held-out", metavar="SHARE", type=float, default=0.0, help="of the documents, as 0.01")
    add("--seed", type=int, default=0, help="chooses which documents are held out")
    add(
        "--end-of-document",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token (default)",
    )
    add("--max-tokens", metavar="N", type=positive, help="stop before more than N tokens")
    add("--max-bytes", metavar="N", type=positive, help="stop before more bytes of text")
    add("--max-document-bytes", metavar="N", type=positive, default=1 << 24, help="a longer document is bad")
    add("--max-bad", metavar="N", type=at_least(0), default=0, help="bad documents to skip")
    add("--source-library", action="store_true", help="add Python's standard library")
    add("--source-packages", action="store_true", help="add the installed Python packages")
    add_output(command)


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.data import prepare, sources
    from megatron_router_upcycling.data.record import Options

    start = time.monotonic()
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise UserError("--tokenizer: name one, or train one with --train-tokenizer N, not both")
    if args.slurm and (args.executor != "slurm" or not all("=" in option for option in args.slurm)):
        raise UserError("--slurm: is for --executor slurm, and of the form KEY=VALUE, as partition=cpu")
    args.slurm = dict(option.removeprefix("--").split("=", 1) for option in args.slurm)
    args.output = args.output.absolute()
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    found, left_out = sources.find(args.sources)
    found += sources.python_library() if args.source_library else []
    found += sources.python_packages() if args.source_packages else []
    if not found:
        raise UserError("SOURCE: name files or folders of text, or give --source-packages")
    with progress_bar("prepare-data", sum(source.size for source in found), args.quiet) as progress:
        records, slow = prepare.run(found, left_out, options, progress)
    if args.quiet:
        return
    if slow:
        print(f"tokens by tokenizers, which is slower than tiktoken: {slow}")
    for prefix, made in zip(options.prefixes, records, strict=True):
        print(
            f"{prefix}: {made.documents:,} documents, {made.tokens:,} tokens ({made.dtype}) of {made.bytes:,}"
            f" bytes, {made.bytes_per_token:.2f} bytes a token, the longest {made.longest_document:,} tokens"
        )
    skipped = f"; {made.skipped_count} bad documents skipped" if made.skipped_count else ""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
    others = f"; left out: {kinds}" if kinds else ""
    print(f"{time.monotonic() - start:.1f} s{skipped}{others}; see {options.output}.json")
