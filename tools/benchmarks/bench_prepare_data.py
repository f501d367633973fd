"""Time and memory of ``router-upcycle prepare-data`` on a file of JSON lines.

    .venv/bin/python tools/benchmarks/bench_prepare_data.py [--megatron ../Megatron-LM] [--other CHECKOUT]

Beside it, on the same text with the same tokenizer and as many processes: Megatron-LM's
``tools/preprocess_data.py``, and ``prepare-data`` of another checkout of this project, whose bytes must be
the same. Text is Python source of installed packages. ``--normalizer NFKC`` makes a tokenizer that tiktoken
does not serve. Whole commands are timed, in rounds in which all take turns; ratios are medians of rounds.
Memory is the largest process's.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import measuring  # type: ignore[import-not-found]  # beside this file

from megatron_router_upcycling.data import sources

# How Qwen2's tokenizer cuts text.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_text(file: Path, count: int) -> None:
    """Lines with ``count`` bytes of text."""
    with file.open("w", encoding="utf-8") as lines:
        for source in sources.python_packages():
            text = Path(source.path).read_text(encoding="utf-8")
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n" if text else "")
            count -= source.size
            if count <= 0:
                return


def read_text(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def make_tokenizer(file: Path, folder: Path, vocabulary: int, normalizer: str) -> None:
    """A folder as Qwen's, trained on some of the text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = getattr(normalizers, normalizer)()
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_text(file)[::10], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    file, folder = work / "text.jsonl", work / "tokenizer"
    print(f"making {options.megabytes} MB of text and a tokenizer ...", file=sys.stderr)
    measuring.aside(write_text, file, options.megabytes * 10**6)
    measuring.aside(make_tokenizer, file, folder, options.vocabulary, options.normalizer)
    workers = ("--workers", options.workers)
    ours = ("prepare-data", file, "--tokenizer", folder, "--overwrite", "--quiet", *workers, "--output")
    theirs = (options.megatron or Path()) / "tools/preprocess_data.py"
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder, "--append-eod")
    files = ("--input", file, "--output-prefix", work / "theirs", "--log-interval", "1000000")
    commands = {"prepare-data": (*measuring.CLI, *ours, work / "ours")}
    if options.megatron:
        commands["preprocess_data"] = (sys.executable, theirs, *files, *flags, *workers)
    if options.other:
        commands["other"] = (
            "env",
            "-C",
            options.other,
            f"PYTHONPATH={options.other}",
            *measuring.CLI,
            *ours,
            work / "other",
        )
    taken = measuring.Commands()

    def seconds(name: str) -> float:
        taken.take(name, *commands[name])
        return taken.taken[name][-1].seconds

    rounds = measuring.take_turns(seconds, tuple(commands), options.rounds, warm_up=0)
    record = json.loads((work / "ours.json").read_text())
    prefixes = {"preprocess_data": "theirs_text_document", "other": "other"}
    return {
        "text_bytes": record["bytes"],
        "tokens": record["tokens"],
        "workers": options.workers,
        "seconds": rounds,
        "ratios": {
            name: measuring.ratios(rounds[name], rounds["prepare-data"])
            for name in commands
            if name != "prepare-data"
        },
        "peak_memory_mb": taken.peak_mb(),
        "processor_seconds": taken.processor_seconds(),
        "same_bytes": {
            name: all(
                (work / f"ours{end}").read_bytes() == (work / f"{prefixes[name]}{end}").read_bytes()
                for end in (".bin", ".idx")
            )
            for name in commands
            if name != "prepare-data"
        },
    }


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
    for name, ratios in result["ratios"].items():
        same = "the same" if result["same_bytes"][name] else "NOT THE SAME"
        lines.append(
            f"prepare-data is {median(ratios):.2f} times as fast as {name} (rounds"
            f" {', '.join(f'{ratio:.2f}' for ratio in ratios)}); the bytes are {same}"
        )
    return "\n".join(lines)


def checkout(text: str) -> Path:
    """``--megatron``, which must hold what is to be compared with."""
    if not (Path(text) / "tools/preprocess_data.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} holds no tools/preprocess_data.py")
    return Path(text)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--megatron", type=checkout, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--other", type=Path, metavar="DIR", help="another checkout of this project")
    parser.add_argument("--normalizer", choices=("NFC", "NFKC"), default="NFC", help="(NFC)")
    parser.add_argument("--megabytes", type=int, default=100, help="of text (100)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="of the tokenizer (32000)")
    parser.add_argument("--rounds", type=int, default=3)
    measuring.main(parser, run, report)


if __name__ == "__main__":
    main()
