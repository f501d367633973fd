"""Time and memory of ``router-upcycle prepare-data`` on a file of JSON lines.

    .venv/bin/python tools/benchmarks/bench_prepare_data.py --megatron ../Megatron-LM [--megabytes 100]

Beside it, on the same text with the same tokenizer and as many processes: the tokenizers library alone, with
the text in memory and nothing kept of the tokens, and Megatron-LM's ``tools/preprocess_data.py``, whose bytes
must be the same. Without ``--megatron`` the latter is left out. Text is Python source of installed packages.
Whole commands are timed, in rounds in which all take turns; ratios are medians of the rounds'. Memory is the
largest process's.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import measuring  # type: ignore[import-not-found]  # beside this file

from megatron_router_upcycling.data import sources

SPEED_LIMIT = 1.5  # times preprocess_data
SHARE_LIMIT = 0.8  # of the tokenizer alone
BATCH = 1 << 20  # characters
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


def make_tokenizer(file: Path, folder: Path, vocabulary: int) -> None:
    """A folder as Qwen's, trained on some of the text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
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


def tokenise(file: Path, folder: Path, share: tuple[int, int], ready: Any, processor: Any) -> None:
    """The tokenizer alone over every so many-th document; adds its processor time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batches: list[list[str]] = [[]]
    for text in read_text(file)[share[0] :: share[1]]:
        if sum(map(len, batches[-1])) >= BATCH:
            batches.append([])
        batches[-1].append(text)
    ready.wait()
    start = time.process_time()
    for batch in batches:
        tokenizer.encode_batch_fast(batch)
    with processor.get_lock():
        processor.value += time.process_time() - start
    ready.wait()


def tokenizer_alone(file: Path, folder: Path, workers: int) -> measuring.Usage:
    context = multiprocessing.get_context("spawn")
    ready, processor = context.Barrier(workers + 1), context.Value("d", 0.0)
    processes = [
        context.Process(target=tokenise, args=(file, folder, (number, workers), ready, processor))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    ready.wait()
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return measuring.Usage(seconds, processor.value, 0.0)


def run(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    file, folder = work / "text.jsonl", work / "tokenizer"
    print(f"making {options.megabytes} MB of text and a tokenizer ...", file=sys.stderr)
    measuring.aside(write_text, file, options.megabytes * 10**6)
    measuring.aside(make_tokenizer, file, folder, options.vocabulary)
    output = ("--output", work / "ours", "--overwrite", "--quiet")
    theirs = (options.megatron or Path()) / "tools/preprocess_data.py"
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder, "--append-eod")
    files = ("--input", file, "--output-prefix", work / "theirs", "--log-interval", "1000000")
    workers = ("--workers", options.workers)
    commands = {
        "prepare-data": (*measuring.CLI, "prepare-data", file, "--tokenizer", folder, *output, *workers),
        "preprocess_data": (sys.executable, theirs, *files, *flags, *workers),
    }
    taken = measuring.Commands()

    def seconds(name: str) -> float:
        if name == "tokenizer alone":
            alone = tokenizer_alone(file, folder, options.workers)
            taken.taken.setdefault(name, []).append(alone)
        else:
            taken.take(name, *commands[name])
        return taken.taken[name][-1].seconds

    names = ("prepare-data", "tokenizer alone", *(["preprocess_data"] if options.megatron else []))
    rounds = measuring.take_turns(seconds, names, options.rounds, warm_up=0)
    record = json.loads((work / "ours.json").read_text())
    same = None
    if options.megatron:
        same = all(
            (work / f"ours{end}").read_bytes() == (work / f"theirs_text_document{end}").read_bytes()
            for end in (".bin", ".idx")
        )
    return {
        "text_bytes": record["bytes"],
        "tokens": record["tokens"],
        "workers": options.workers,
        "seconds": rounds,
        "ratios": {name: measuring.ratios(rounds[name], rounds["prepare-data"]) for name in names[1:]},
        "peak_memory_mb": taken.peak_mb(),
        "processor_seconds": taken.processor_seconds(),
        "same_bytes": same,
    }


def report(result: dict[str, Any]) -> str:
    size, ratios = result["text_bytes"], result["ratios"]
    lines = [
        f"{size / 1e6:.0f} MB of text, {result['tokens']:,} tokens, {result['workers']} workers, medians:"
    ]
    for name, rounds in result["seconds"].items():
        seconds = median(rounds)
        memory = result["peak_memory_mb"].get(name)
        more = f", {result['processor_seconds'][name]:6.1f} s of processor time"
        more += f", {memory:.0f} MB in the largest process" if memory else ""
        lines.append(f"  {name:<16} {seconds:7.1f} s, {size / seconds / 1e6:6.2f} MB/s{more}")

    def all_of(name: str) -> str:
        return ", ".join(f"{ratio:.2f}" for ratio in ratios[name])

    lines.append(
        f"prepare-data is at {median(ratios['tokenizer alone']):.0%} of the tokenizer alone (goal:"
        f" {SHARE_LIMIT:.0%}; rounds {all_of('tokenizer alone')})"
    )
    if "preprocess_data" in ratios:
        lines.append(
            f"and {median(ratios['preprocess_data']):.2f} times as fast as Megatron-LM's preprocess_data"
            f" (goal: {SPEED_LIMIT}; rounds {all_of('preprocess_data')}); the bytes are"
            f" {'the same' if result['same_bytes'] else 'NOT THE SAME'}"
        )
    else:
        lines.append("Megatron-LM's preprocess_data was not tried: name its checkout with --megatron")
    return "\n".join(lines)


def checkout(text: str) -> Path:
    """``--megatron``, which must hold what is to be compared with."""
    if not (Path(text) / "tools/preprocess_data.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} holds no tools/preprocess_data.py")
    return Path(text)


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--megatron", type=checkout, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=100, help="of text (100)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="of the tokenizer (32000)")
    parser.add_argument("--rounds", type=int, default=3)
    measuring.main(parser, run, report)


if __name__ == "__main__":
    main()
