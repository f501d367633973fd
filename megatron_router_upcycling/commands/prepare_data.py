"""Text into what Megatron trains on."""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import tokens_bar
from megatron_router_upcycling.errors import UserError

EXAMPLES = """\
example:
  router-upcycle prepare-data texts/ more.jsonl.gz --tokenizer Qwen1.5-0.5B --held-out 0.01 \\
      --output data/texts
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config moe.yaml --load ckpt/moe \\
      --train-data-path data/texts --valid-data-path data/texts_held_out

A document is a line of .jsonl (its --text-key entry), an object of an array in .json, a row of .parquet or
of a data set that datasets has saved, or a whole file of .txt or of code. All but the tables may end in .gz,
.bz2, .xz or .zst. Text is UTF-8. Blank lines and empty texts are passed over; anything else that is no
document is bad: the first one stops the command, unless --max-bad allows for it.

PREFIX.bin and PREFIX.idx are written, PREFIX_held_out.bin and .idx with --held-out, PREFIX.tokenizer.model
with --train-tokenizer, and beside each .bin a .json with what is in it: documents, tokens, bytes a token, the
longest document, the tokenizer's vocabulary and digest, and what was skipped and why.

Killed, the command goes on from its finished parts when it is given again, whatever --workers is, and ends
with the same bytes. Memory goes by the longest document and --workers, not by the size of files; Megatron's
writer keeps about 100 bytes a document.
"""


def add(commands: Any) -> None:
    command = commands.add_parser(
        "prepare-data",
        help="make Megatron's training data of text",
        description="Tokenise text in worker processes and write Megatron's .bin and .idx, whole or not at"
        " all.",
        epilog=EXAMPLES,
    )
    command.add_argument(
        "sources", metavar="SOURCE", type=Path, nargs="*", help="a file of text, a folder, a saved data set"
    )
    command.add_argument("--output", metavar="PREFIX", type=Path, required=True, help="what to make")
    command.add_argument(
        "--tokenizer",
        metavar="PLACE",
        type=Path,
        help="a Hugging Face folder, or a sentencepiece .model file",
    )
    command.add_argument(
        "--train-tokenizer", metavar="N", type=int, help="train a sentencepiece one with N pieces on the text"
    )
    command.add_argument("--text-key", metavar="NAME", default="text", help="entry or column (default: text)")
    command.add_argument("--workers", metavar="N", type=int, help="processes (default: all cores)")
    command.add_argument(
        "--held-out", metavar="SHARE", type=float, default=0.0, help="of the documents, as 0.01 (default: 0)"
    )
    command.add_argument("--seed", type=int, default=0, help="chooses which are held out (default: 0)")
    command.add_argument(
        "--end-of-document",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token (default)",
    )
    command.add_argument("--max-tokens", metavar="N", type=int, help="stop before more than N tokens")
    command.add_argument("--max-bytes", metavar="N", type=int, help="stop before more than N bytes of text")
    command.add_argument(
        "--max-document-bytes",
        metavar="N",
        type=int,
        default=1 << 24,
        help="a longer line or document is bad (default: 16 MiB); a worker takes some 130 times its size",
    )
    command.add_argument(
        "--max-bad", metavar="N", type=int, default=0, help="leave out as many bad documents (default: 0)"
    )
    command.add_argument(
        "--source-library", action="store_true", help="add the Python standard library to the sources"
    )
    command.add_argument(
        "--source-packages",
        action="store_true",
        help="add the Python source of the packages that are installed in this environment",
    )
    command.add_argument("--overwrite", action="store_true", help="replace PREFIX's files once all is made")
    command.add_argument("--quiet", action="store_true", help="print errors only")
    command.set_defaults(run=run)


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
        workers=args.workers if args.workers is not None else len(os.sched_getaffinity(0)),
        overwrite=args.overwrite,
    )
    job = prepare.prepare(_sources(args), args.output, args.tokenizer, options)
    with tokens_bar("prepare-data", job.bytes_to_read, args.quiet) as progress:
        records = prepare.run(job, progress)
    if args.quiet:
        return
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


def _listed(left_out: dict[str, int]) -> str:
    """The commonest kinds of files that were left out."""
    return ", ".join(f"{count} {suffix}" for suffix, count in list(left_out.items())[:5])
