"""Where a run's data come from, by Megatron's flags: one source, with weights and shares that can be used.

Pure but for reading the lists that flags name: imports neither torch nor Megatron.
"""

import contextlib
import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError, reason

PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
# Each way of naming data: its arguments. A run takes one of them.
SOURCES = (("mock_data",), ("data_path",), ("data_args_path",), PER_SPLIT, ("per_split_data_args_path",))
SHARES = re.compile(r"\s*\d*\.?\d+(\s*[,/]\s*\d*\.?\d+){0,2}\s*")


def choose(args: Namespace, argv: list[str]) -> None:
    """Let a source that is given as a flag replace those of the YAML file, and its ``split`` if need be."""
    flags = {word.partition("=")[0] for word in argv}
    on_command_line = [names for names in SOURCES if any(_flag(name) in flags for name in names)]
    for names in SOURCES:
        for name in names if on_command_line and names not in on_command_line else ():
            setattr(args, name, False if name == "mock_data" else None)
    given = [names for names in SOURCES if any(getattr(args, name) for name in names)]
    if len(given) > 1:
        first, second = (next(_flag(n) for n in names if getattr(args, n)) for names in given[:2])
        raise UserError(f"{first}, {second}: name two sources of data; give one of them")
    by_split = given and given[0] in SOURCES[3:]
    if by_split and args.split is not None and "--split" in flags:
        raise UserError(f"--split {args.split}: divides one source, and each split has its own; leave it out")
    if by_split:
        args.split = None
    elif given == [("data_args_path",)] and args.split is None:
        raise UserError("--split: is missing; give the shares of training, validation and test: 99,1,0")


def check(args: Namespace) -> None:
    """Refuse lists, weights and shares with which Megatron's datasets cannot be built."""
    for flag, words in lists(args):
        if (weights := _weights(flag, words)) is None:
            continue
        for weight, prefix in weights:
            if not 0 < weight < math.inf:
                raise UserError(
                    f"{flag}: the weight of {prefix} is {weight:g}; give more than 0, or leave it out"
                )
    if args.split is not None and not args.mock_data and not any(splits(args)):
        raise UserError(f"--split {args.split}: give the shares of training, validation and test: 99,1,0")
    given = any(getattr(args, name) for names in SOURCES for name in names)
    if given and not splits(args)[0] and not args.skip_train:
        where = "--train-data-path" if args.split is None else f"--split {args.split}"
        raise UserError(f"{where}: there is nothing to train on; give training data, or a share of them")
    if args.multiple_validation_sets and not args.full_validation:
        raise UserError("--multiple-validation-sets: works only with --full-validation; give that too")
    if path := args.per_dataset_sequences_path:
        known = sequences_per_dataset(path)
        for flag, prefix in prefixes(args):
            if prefix not in known:
                raise UserError(f"--per-dataset-sequences-path {path}: says nothing of {prefix} ({flag})")


def check_validation(args: Namespace) -> str | None:
    """Validate nothing where there is nothing to validate on, which Megatron would try; a line to say so."""
    _, validation, test = splits(args)
    if validation or not (args.eval_iters or args.full_validation):
        return None
    if test or args.skip_train or args.full_validation:
        raise UserError(
            f"--eval-iters {args.eval_iters}: there are no validation data; name some, or give --eval-iters 0"
        )
    args.eval_iters = 0
    return "there are no validation data: nothing is validated"


def splits(args: Namespace) -> tuple[bool, bool, bool]:
    """Whether there are data to train, validate and test on."""
    if args.mock_data:
        return True, True, True
    if args.split is not None:
        words = re.split("[,/]", args.split) if SHARES.fullmatch(args.split) else []
        shares = [float(word) > 0 for word in words] + [False] * 3
        return shares[0], shares[1], shares[2]
    if (path := args.per_split_data_args_path) and "://" not in path:
        found = _json(f"--per-split-data-args-path {path}", path)
        return bool(found.get("train")), bool(found.get("valid")), bool(found.get("test"))
    if path:
        return True, True, True
    return bool(args.train_data_path), bool(args.valid_data_path), bool(args.test_data_path)


def lists(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Each flag that names data, with its words: prefixes, or weights and prefixes by turns.

    Raises:
        UserError: a file that a flag names cannot be read as such a list.
    """
    for name in ("data_path", *PER_SPLIT):
        if (words := getattr(args, name)) is not None:
            yield _flag(name), _not_empty(_flag(name), words)
    if (path := args.data_args_path) and "://" not in path:  # else Megatron reads it from object storage
        flag = f"--data-args-path {path}"
        yield flag, _not_empty(flag, _read(flag, path).split())
    if (path := args.per_split_data_args_path) and "://" not in path:
        flag = f"--per-split-data-args-path {path}"
        found = _json(flag, path)
        for split in ("train", "valid", "test"):
            if split not in found:
                raise UserError(f"{flag}: has no {split}; give train, valid and test (null for none)")
            words = found[split].split() if isinstance(found[split], str) else found[split]
            if words is None:
                continue
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise UserError(
                    f"{flag}: {split} is no list of prefixes, or of weights and prefixes as texts"
                )
            yield f"{flag}: {split}", _not_empty(f"{flag}: {split}", words)


def prefixes(args: Namespace) -> Iterator[tuple[str, str]]:
    """Each prefix of data with the flag that names it."""
    for flag, words in lists(args):
        weights = _weights(flag, words)
        for prefix in words if weights is None else [prefix for _, prefix in weights]:
            yield flag, prefix


def sequences_per_dataset(path: str) -> dict[str, Any]:
    """What ``--per-dataset-sequences-path`` holds: sequences and documents of each prefix."""
    return _json(f"--per-dataset-sequences-path {path}", path)


def _weights(flag: str, words: list[str]) -> list[tuple[float, str]] | None:
    """Weights and prefixes, where Megatron reads ``words`` so: in pairs that begin with numbers."""
    if len(words) % 2:
        return None
    found = []
    for word, prefix in zip(words[::2], words[1::2], strict=True):
        with contextlib.suppress(ValueError):
            found.append((float(word), prefix))
    if found and len(found) < len(words) / 2:
        raise UserError(f"{flag}: only some sources have a weight; give all of them one, or none")
    return found or None


def _not_empty(flag: str, words: list[str]) -> list[str]:
    if not words:
        raise UserError(f"{flag}: names no data; give prefixes of .bin and .idx files")
    return words


def _json(flag: str, path: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(flag, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: is no JSON ({reason(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{flag}: is no JSON object")
    return found


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot be read ({reason(error)})") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
