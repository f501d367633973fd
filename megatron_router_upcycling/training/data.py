"""A run's data and tokenizer from Megatron's flags: exactly one source, with valid weights and shares."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.data import agreement
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.files import blocked_by

PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
# The arguments of each way to name data. A run uses exactly one way.
SOURCES = (("mock_data",), ("data_path",), ("data_args_path",), PER_SPLIT, ("per_split_data_args_path",))
SHARES = re.compile(r"\s*\d*\.?\d+(\s*[,/]\s*\d*\.?\d+){0,2}\s*")


def choose_source(args: Namespace, argv: list[str]) -> None:
    """Let a data source given as a flag replace the YAML file's, and also its ``split`` if that conflicts."""
    flags = {word.partition("=")[0] for word in argv}
    on_command_line = [names for names in SOURCES if any(flag_of(name) in flags for name in names)]
    for names in SOURCES:
        for name in names if on_command_line and names not in on_command_line else ():
            setattr(args, name, False if name == "mock_data" else None)
    given = [names for names in SOURCES if any(getattr(args, name) for name in names)]
    if len(given) > 1:
        first, second = (next(flag_of(n) for n in names if getattr(args, n)) for names in given[:2])
        raise UserError(f"{first}, {second}: name two sources of data; give one of them")
    by_split = given and given[0] in SOURCES[3:]
    if by_split and args.split is not None and "--split" in flags:
        raise UserError(f"--split {args.split}: divides one source, and each split has its own; leave it out")
    if by_split:
        args.split = None
    elif given == [("data_args_path",)] and args.split is None:
        raise UserError("--split: is missing; give the shares of training, validation and test: 99,1,0")


def choose_tokenizer(args: Namespace, argv: list[str], load: str | None) -> str | None:
    """Use the tokenizer stored with ``load``, unless a flag or an existing path names another one."""
    named = args.tokenizer_model
    if load is None or any(word.partition("=")[0] == "--tokenizer-model" for word in argv):
        return None
    found = None if named and Path(named).exists() else beside.tokenizer_of(Path(load) / beside.FOLDER)
    if found is None or args.tokenizer_type not in (None, found[0]):
        return None
    args.tokenizer_type, args.tokenizer_model = found[0], str(found[1])
    return f"tokenizer: {found[1]}" + (f", for {named} is not there" if named else "")


def hand_on_tokenizer(args: Namespace, load: str | None, save: str) -> None:
    """Link the tokenizer and the other files stored with ``load`` into the folder ``save``."""
    places = [Path(place) for place in (args.tokenizer_model, load and Path(load) / beside.FOLDER) if place]
    if place := next((place for place in places if place.exists()), None):
        beside.hand_on(place, Path(save))


def check_data(args: Namespace) -> None:
    """Refuse missing data, and data flags that contradict each other, before anything is built."""
    flag = _flag_of_source(args)
    if not _blends(args) and not args.mock_data:
        raise UserError("--data-path: name the data to run over (the prefix of a .bin and an .idx file)")
    paths = prefixes(args)
    for path in paths:
        for file in (f"{path}.bin", f"{path}.idx"):
            if "://" not in path and not Path(file).is_file():
                raise UserError(f"{flag} {path}: no file {file}; name the prefix of a .bin and an .idx")
    if not splits(args)[0] and not args.skip_train:
        where = flag if args.split is None else f"--split {args.split}"
        raise UserError(f"{where}: there is nothing to train on; give training data, or a share of them")
    if args.multiple_validation_sets and not args.full_validation:
        raise UserError("--multiple-validation-sets: works only with --full-validation; give that too")
    if path := args.per_dataset_sequences_path:
        known = sequences_per_dataset(path)
        if missing := [prefix for prefix in paths if prefix not in known]:
            raise UserError(f"--per-dataset-sequences-path {path}: says nothing of {missing[0]} ({flag})")
    choose_cache(args, [path for path in paths if "://" not in path])


def check_validation(args: Namespace) -> str | None:
    """Turn validation off if there are no validation data (Megatron would try); return a notice to print."""
    _, validation, test = splits(args)
    if validation or not (args.eval_iters or args.full_validation):
        return None
    if test or args.skip_train or args.full_validation:
        raise UserError(
            f"--eval-iters {args.eval_iters}: there are no validation data; name some, or give --eval-iters 0"
        )
    args.eval_iters = 0
    return "there are no validation data: nothing is validated"


def splits(args: Namespace) -> list[bool]:
    """Whether there are data to train, validate and test on."""
    if args.mock_data:
        return [True] * 3
    if args.split is None:
        shares = [blend is not None for blend in _blends(args)]
    else:
        words = re.split("[,/]", args.split) if SHARES.fullmatch(args.split) else []
        shares = [float(word) > 0 for word in words]
        if not any(shares):
            raise UserError(f"--split {args.split}: give the shares of training, validation and test: 99,1,0")
    return (shares + [False] * 3)[:3]


def prefixes(args: Namespace) -> list[str]:
    """The prefixes of .bin and .idx files that a run reads, each once."""
    return list(dict.fromkeys(path for blend in _blends(args) if blend for path in blend[0]))


def _blends(args: Namespace) -> list[tuple[list[str], list[float] | None] | None]:
    """Prefixes and their weights as Megatron reads them: one entry, or one for each of the three splits."""
    from megatron.training.utils import get_blend_and_blend_per_split

    flag = _flag_of_source(args)
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except Exception as error:  # of a file or, by Megatron-Storage-Client, of an object store
        raise UserError(
            f"{flag}: cannot be read as prefixes of .bin and .idx files, or as alternating weights and"
            f" prefixes; a file of splits has them for each of train, valid and test ({reason(error)})"
        ) from None
    found = blend_per_split or ([blend] if blend else [])
    for prefixes, weights in filter(None, found):
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not 0 < weight < math.inf:
                more = "give more than 0, or leave it out"
                raise UserError(f"{flag}: the weight of {prefix} is {weight:g}; {more}")
    return found


def _flag_of_source(args: Namespace) -> str:
    given = [name for names in SOURCES for name in names if getattr(args, name)]
    flags = ", ".join(map(flag_of, given)) or "--data-path"
    return f"{flags} {getattr(args, given[0])}" if given and "args_path" in given[0] else flags


def sequences_per_dataset(path: str) -> dict[str, Any]:
    """The content of ``--per-dataset-sequences-path``: sequences and documents of each prefix."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"--per-dataset-sequences-path {path}: no JSON object ({reason(error)})") from None


def choose_cache(args: Namespace, paths: list[str]) -> None:
    """Set ``--data-cache-path`` if Megatron's default, a folder next to the data, is not writable."""
    if args.data_cache_path is not None:
        if not args.dataloader_fast_cache_load and (place := blocked_by(Path(args.data_cache_path))):
            raise UserError(f"--data-cache-path {args.data_cache_path}: cannot write in {place}")
        return
    read_only = [path for path in paths if blocked_by(Path(path)) and not Path(path, "cache").exists()]
    if not read_only:
        return
    if not args.save:
        raise UserError(
            f"--data-path {read_only[0]}: Megatron keeps an index beside the data, and that folder cannot be"
            " written; give --data-cache-path FOLDER"
        )
    args.data_cache_path = str(Path(args.save) / "data_cache")
    if args.rank == 0:
        print(f"{read_only[0]}: read-only; the index of the data goes to {args.data_cache_path}", flush=True)


def check_tokens(args: Namespace, load: str | None) -> None:
    """Refuse data of another tokenizer or with tokens beyond the vocabulary. Call after ``set_global``."""
    beside_load = beside.tokenizer_of(Path(load) / beside.FOLDER) if load else None
    named = Path(args.tokenizer_model) if args.tokenizer_model else None
    tokenizer = beside_load[1] if beside_load else named
    known = tokenizer if tokenizer and tokenizer.exists() else None
    agreement.check([path for path in prefixes(args) if "://" not in path], known, args.padded_vocab_size)
