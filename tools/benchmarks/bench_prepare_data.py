"""Measure time and memory of ``router-upcycle prepare-data`` on a file of JSON lines.

    .venv/bin/python tools/benchmarks/bench_prepare_data.py [--megatron ../Megatron-LM]

With --megatron, Megatron-LM's ``tools/preprocess_data.py`` runs on the same text with the same tokenizer and
number of processes, and must write the same bytes. The text is Python source of installed packages. Whole
commands are timed, in rounds of both; the ratio is the median of the rounds' ratios. Memory is that of the
largest process.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import measuring

from megatron_router_upcycling.data import sources

# The pre-tokenizer pattern of Qwen2.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_text(file: Path, count: int) -> None:
    """Write JSON lines with about ``count`` bytes of text."""
    with file.open("w", encoding="utf-8") as lines:
        for source in sources.python_packages():
            text = Path(source.path).read_text(encoding="utf-8")
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n" if text else "")
            count -= source.size
            if count <= 0:
                return


def make_tokenizer(file: Path, folder: Path, vocabulary: int) -> None:
    """Make a tokenizer folder like Qwen's, trained on a tenth of the text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    with file.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines][::10], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    file, folder = work / "text.jsonl", work / "tokenizer"
    print(f"making {options.megabytes} MB of text and a tokenizer ...", file=sys.stderr)
    measuring.aside(write_text, file, options.megabytes * 10**6)
    measuring.aside(make_tokenizer, file, folder, options.vocabulary)
    workers = ("--workers", options.workers)
    ours = ("prepare-data", file, "--tokenizer", folder, "--overwrite", "--quiet", "--output", work / "ours")
    commands = {"prepare-data": (*measuring.CLI, *ours, *workers)}
    if options.megatron:
        theirs = (sys.executable, options.megatron / "tools/preprocess_data.py")
        flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder, "--append-eod")
        files = ("--input", file, "--output-prefix", work / "theirs", "--log-interval", "1000000")
        commands["preprocess_data"] = (*theirs, *files, *flags, *workers)
    taken = measuring.Commands()

    def seconds(name: str) -> float:
        taken.take(name, *commands[name])
        return taken.taken[name][-1].seconds

    rounds = measuring.take_turns(seconds, tuple(commands), options.rounds, warm_up=0)
    record = json.loads((work / "ours.json").read_text())
    found = {
        "text_bytes": record["bytes"],
        "tokens": record["tokens"],
        "workers": options.workers,
        "seconds": rounds,
        "peak_memory_mb": taken.peak_mb(),
        "processor_seconds": taken.processor_seconds(),
    }
    if options.megatron:
        pairs = [(work / f"ours{end}", work / f"theirs_text_document{end}") for end in (".bin", ".idx")]
        found["ratios"] = measuring.ratios(rounds["preprocess_data"], rounds["prepare-data"])
        found["same_bytes"] = all(one.read_bytes() == other.read_bytes() for one, other in pairs)
    return found


def report(result: dict[str, Any]) -> str:
    size = result["text_bytes"]
    lines = [
        f"{size / 1e6:.0f} MB of text, {result['tokens']:,} tokens, {result['workers']} workers, medians:"
    ]
    for name, rounds in result["seconds"].items():
        seconds = median(rounds)
        lines.append(
            f"  {name:<16} {seconds:7.1f} s, {size / seconds / 1e6:6.2f} MB/s,"
            f" {result['processor_seconds'][name]:6.1f} s of processor time,"
            f" {result['peak_memory_mb'][name]:.0f} MB in the largest process"
        )
    if ratios := result.get("ratios"):
        same = "the same" if result["same_bytes"] else "NOT THE SAME"
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"prepare-data is {median(ratios):.2f} times as fast as preprocess_data (rounds {each});"
            f" the bytes are {same}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = measuring.Parser(__doc__)
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=100, help="of text (100)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="of the tokenizer (32000)")
    parser.add_argument("--rounds", type=int, default=3)
    measuring.main(parser, run, report)
