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
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import tokens_bar
from megatron_router_upcycling.config.flags import add_output
from megatron_router_upcycling.errors import UserError


def add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sources", metavar="SOURCE", nargs="*", help="a file of text, a folder, a saved data set, an address"
    )
    command.add_argument("--output", metavar="PREFIX", type=Path, required=True, help="what to make")
    command.add_argument(
        "--tokenizer", metavar="PLACE", type=Path, help="a Hugging Face folder or sentencepiece .model file"
    )
    command.add_argument(
        "--train-tokenizer", metavar="N", type=int, help="train a sentencepiece one with N pieces on the text"
    )
    command.add_argument("--text-key", metavar="NAME", default="text", help="entry or column of the text")
    command.add_argument("--workers", metavar="N", type=int, help="tasks at a time (default: all cores)")
    command.add_argument("--executor", choices=("local", "slurm"), default="local", help="where tasks run")
    command.add_argument(
        "--slurm", metavar="KEY=VALUE", action="append", default=[], help="option of sbatch: partition=cpu"
    )
    command.add_argument(
        "--held-out", metavar="SHARE", type=float, default=0.0, help="of the documents, as 0.01"
    )
    command.add_argument("--seed", type=int, default=0, help="chooses which documents are held out")
    command.add_argument(
        "--end-of-document",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token (default)",
    )
    command.add_argument("--max-tokens", metavar="N", type=int, help="stop before more than N tokens")
    command.add_argument("--max-bytes", metavar="N", type=int, help="stop before more than N bytes of text")
    command.add_argument(
        "--max-document-bytes", metavar="N", type=int, default=1 << 24, help="a longer document is bad"
    )
    command.add_argument("--max-bad", metavar="N", type=int, default=0, help="skip up to N bad documents")
    command.add_argument("--source-library", action="store_true", help="add Python's standard library")
    command.add_argument("--source-packages", action="store_true", help="add the installed Python packages")
    add_output(command)


def run(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.data import prepare

    start = time.monotonic()
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise UserError("--tokenizer: name one, or train one with --train-tokenizer N, not both")
    options = prepare.Options(
        text_key=args.text_key,
        train_tokenizer=args.train_tokenizer,
        held_out=args.held_out,
        seed=args.seed,
        end_of_document=args.end_of_document,
        max_tokens=args.max_tokens,
        max_bytes=args.max_bytes,
        max_document_bytes=args.max_document_bytes,
        max_bad=args.max_bad,
        workers=args.workers,
        executor=args.executor,
        slurm=_sbatch_options(args),
        overwrite=args.overwrite,
    )
    job = prepare.prepare(_sources(args), args.output, args.tokenizer, options)
    with tokens_bar("prepare-data", job.bytes_to_read, args.quiet) as progress:
        records, slow = prepare.run(job, progress)
    if args.quiet:
        return
    if slow:
        print(f"tokens by tokenizers, which is slower than tiktoken: {slow}")
    for prefix, made in zip(job.prefixes, records, strict=True):
        print(
            f"{prefix}: {made.documents:,} documents, {made.tokens:,} tokens ({made.dtype}) of {made.bytes:,}"
            f" bytes, {made.bytes_per_token:.2f} bytes a token, the longest {made.longest_document:,} tokens"
        )
    first, seconds = records[0], time.monotonic() - start
    skipped = f"; {first.skipped_count} bad documents skipped" if first.skipped_count else ""
    others = f"; left out: {_listed(first.left_out)}" if first.left_out else ""
    print(f"{seconds:.1f} s{skipped}{others}; see {prefix.parent}/{job.output.name}.json")


def _sources(args: argparse.Namespace) -> Any:
    from megatron_router_upcycling.data import sources

    found, left_out = sources.find(args.sources) if args.sources else ([], Counter[str]())
    if args.source_library:
        found += sources.python_library()
    if args.source_packages:
        found += sources.python_packages()
    if not found:
        raise UserError("SOURCE: name files or folders of text, or give --source-packages")
    return found, left_out


def _sbatch_options(args: argparse.Namespace) -> dict[str, str]:
    if args.slurm and args.executor != "slurm":
        raise UserError("--slurm: is for --executor slurm")
    for option in args.slurm:
        if "=" not in option:
            raise UserError(f"--slurm {option}: is not of the form KEY=VALUE, as partition=cpu")
    return dict(option.removeprefix("--").split("=", 1) for option in args.slurm)


def _listed(left_out: dict[str, int]) -> str:
    """The commonest kinds of files that were left out."""
    return ", ".join(f"{count} {suffix}" for suffix, count in list(left_out.items())[:5])
