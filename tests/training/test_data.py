"""Megatron's flags about data: each is passed on, read by Megatron's own loop, or refused by name."""

import dataclasses
import itertools
import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments
from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import arguments, language_model
from megatron_router_upcycling.training import data as run_data

GROUPS = ("data and dataloader", "sft", "Logits Distillation", *arguments.GROUPS)
# Arguments of those groups that Megatron's training loop, its loaders or its tokenizers read themselves.
READ_BY_MEGATRON = {"phase_transition_iterations", "num_workers", "sft_tokenizer_prompt_format"}
READ_BY_MEGATRON |= {"data_sharding", "fim_data", "logits_save_dir", "logits_save_dtype"}
READ_BY_MEGATRON |= {"logits_save_top_k", "logits_save_top_p", "logits_save_top_p_min_k"}
# Fields that Megatron 0.20 adds, for conversations and sequences of varying length.
OF_0_20 = {"sft_mock_dataset_config_json", "varlen_mock_dataset_config_json", "varlen_sbhd_validation"}
# What needs another flag of its group, which is refused.
WITH_LOGITS_LOAD_DIR = {"logits_load_decode_threads", "logits_load_prefetch_factor"}
WITH_LOGITS_LOAD_DIR |= {"logits_load_msc_prefetch_depth", "logits_load_kd_loss_alpha"}
WITH_LOGITS_LOAD_DIR |= {"logits_load_ignore_errors"}


def megatrons_parser() -> ArgumentParser:
    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def fields() -> list[str]:
    """Fields of the datasets' configuration that arguments set."""
    kind = GPTFIMDatasetConfig
    return [f.name for f in dataclasses.fields(kind) if f.init and f.name not in language_model.NO_ARGUMENT]


def test_every_flag_about_data_is_accounted_for() -> None:
    parser = megatrons_parser()
    of_groups = {
        action.dest: group.title
        for group in parser._action_groups
        for action in group._group_actions
        if group.title in GROUPS
    }
    assert set(GROUPS) == set(of_groups.values())
    passed = {language_model.DATASET_FIELDS.get(name, name) for name in fields()}
    passed |= {f"fim_{name}_token" for name in language_model.FIM_TOKENS} | {"per_dataset_sequences_path"}
    passed |= {"fim_data"} | set(itertools.chain(*run_data.SOURCES))
    refused = {name for name, group in of_groups.items() if group in arguments.GROUPS} - {"data_sharding"}
    refused |= {*arguments.NOT_TAKEN}
    unknown = set(of_groups) - passed - refused - READ_BY_MEGATRON - WITH_LOGITS_LOAD_DIR
    assert not unknown, "pass them on (language_model.dataset_config) or refuse them (arguments.NOT_TAKEN)"
    known = {action.dest for action in parser._actions}
    assert set(arguments.NOT_TAKEN) <= known and set(of_groups) >= READ_BY_MEGATRON


def test_every_field_of_the_datasets_configuration_is_set(tmp_path: Path, data: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({str(data): [200, 201]}))
    words = f"""
        --seed 7 --seq-length 5 --train-data-path {data} --multiple-validation-sets --full-validation
        --num-dataset-builder-threads 3 --data-cache-path {tmp_path} --no-mmap-bin-files --reset-position-ids
        --reset-attention-mask --eod-mask-loss --no-create-attention-mask-in-dataloader
        --object-storage-cache-path cache --mid-level-dataset-surplus 0.5 --allow-ambiguous-pad-tokens
        --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --per-dataset-sequences-path {counts}
        --context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --hybrid-context-parallel
        --dataloader-inter-document-masking --fim-data --fim-rate 0.1 --fim-spm-rate 0.2 --fim-split-sample x
        --fim-fragment-rate 0.3 --fim-no-prefix y --fim-pad-token PAD
        --tokenizer-type NullTokenizer --vocab-size 256
    """
    args = megatrons_parser().parse_args(words.split())
    args.data_parallel_size, args.rank = 6, 0
    found = language_model.dataset_config(args)
    assert isinstance(found, GPTFIMDatasetConfig) and found.fim_extra_tokens["pad"] == "PAD"
    defaults = {field.name: field.default for field in dataclasses.fields(GPTFIMDatasetConfig)}
    unset = {name for name in fields() if getattr(found, name) == defaults[name]}
    assert unset - OF_0_20 == {"blend", "split"}  # which cannot be given beside a source for each split


def test_masked_tokens_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    monkeypatch.setattr(language_model, "get_args", lambda: args)
    mask, losses = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[2.0, 8.0, 3.0]])
    assert language_model.loss_func(mask, losses)[2]["lm loss"].tolist() == [5.0, 2.0]


def sources(**given: Any) -> Namespace:
    names = ("data_path", "split", "data_args_path", *run_data.PER_SPLIT, "per_split_data_args_path")
    others = {"mock_data": False, "skip_train": False, "multiple_validation_sets": False, "eval_iters": 4}
    others |= {"full_validation": False, "per_dataset_sequences_path": None, "data_cache_path": "/tmp"}
    return Namespace(**dict.fromkeys(names) | others | {"dataloader_fast_cache_load": False} | given)


def test_a_source_on_the_command_line_replaces_those_of_the_file() -> None:
    args = sources(data_path=["a"], split="99,1,0", train_data_path=["b"], valid_data_path=["c"])
    run_data.choose_source(args, ["--train-data-path", "b", "--valid-data-path=c"])
    assert (args.data_path, args.split, args.train_data_path) == (None, None, ["b"])
    args = sources(mock_data=True, data_path=["a"], split="99,1,0")
    run_data.choose_source(args, ["--data-path", "a"])
    assert (args.mock_data, args.data_path, args.split) == (False, ["a"], "99,1,0")


A, FILE = ["HERE/a"], "--per-split-data-args-path HERE"
# What is given, what of it on the command line, and how the line begins; HERE is the test's folder.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"data_path": A, "train_data_path": A}, "", "--data-path, --train-data-path: name two sources"),
    ({"train_data_path": A, "split": "9,1"}, "--split 9,1", "--split 9,1: divides one source"),
    ({"data_args_path": "a"}, "", "--split: is missing"),
    ({"data_path": ["0", *A, "1", "b"]}, "", "--data-path: the weight of HERE/a is 0; give more than 0"),
    ({"valid_data_path": ["nan", *A]}, "", "--valid-data-path: the weight of HERE/a is nan"),
    ({"data_path": ["1", "a", "b", "c"]}, "", "--data-path 1: no file 1.bin"),
    ({"data_path": ["HERE/none"], "split": "1"}, "", "--data-path HERE/none: no file HERE/none.bin"),
    *(
        ({"data_path": A, "split": split}, "", f"--split {split}: give the shares of training,")
        for split in ("1,2,3,4", "all", "0,0,0")
    ),
    ({"data_path": A, "split": "0,1"}, "", "--split 0,1: there is nothing to train on"),
    ({"data_args_path": "HERE/none", "split": "1"}, "", "--data-args-path HERE/none: cannot be read"),
    ({"data_args_path": "HERE/empty", "split": "1"}, "", "--data-args-path HERE/empty: cannot be read"),
    *(
        ({"per_split_data_args_path": f"HERE/{name}"}, "", f"{FILE}/{name}: cannot be read")
        for name in ("empty", "train", "number")
    ),
    (
        {"data_path": A, "split": "1", "per_dataset_sequences_path": "HERE/train"},
        "",
        "--per-dataset-sequences-path HERE/train: says nothing of HERE/a (--data-path)",
    ),
    ({"valid_data_path": A}, "", "--valid-data-path: there is nothing to train on"),
    ({"train_data_path": A, "test_data_path": A}, "", "--eval-iters 4: there are no validation data"),
    ({"data_path": A, "split": "1", "full_validation": True}, "", "--eval-iters 4: there are no validation"),
    (
        {"data_path": A, "split": "9,1", "multiple_validation_sets": True},
        "",
        "--multiple-validation-sets: works only with",
    ),
]


def put_in_place(given: Any, folder: Path) -> Any:
    if isinstance(given, list):
        return [put_in_place(item, folder) for item in given]
    return given.replace("HERE", str(folder)) if isinstance(given, str) else given


@pytest.mark.parametrize(("given", "flags", "message"), REFUSED)
def test_sources_that_cannot_be_used_are_one_line(
    tmp_path: Path, given: dict[str, Any], flags: str, message: str
) -> None:
    for name in ("empty", "a.bin", "a.idx"):
        (tmp_path / name).write_text("")
    (tmp_path / "train").write_text('{"train": "a"}')
    (tmp_path / "number").write_text('{"train": [1], "valid": null, "test": null}')
    with pytest.raises(UserError) as refused:
        args = sources(**{name: put_in_place(value, tmp_path) for name, value in given.items()})
        run_data.choose_source(args, flags.split())
        run_data.check_data(args)
        run_data.check_validation(args)
    assert str(refused.value).startswith(put_in_place(message, tmp_path))


def test_a_file_of_splits_names_what_there_is(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "splits"
    file.write_text(json.dumps({"train": f"2 {data} 3 {data}", "valid": [str(data)], "test": None}))
    args = sources(per_split_data_args_path=str(file))
    run_data.check_data(args)
    assert run_data.splits(args) == [True, True, False] and run_data.prefixes(args) == [str(data)]


@pytest.mark.parametrize("given", [{"train_data_path": A}, {"data_path": A, "split": "100,0,0"}])
def test_nothing_is_validated_without_validation_data(given: dict[str, Any]) -> None:
    args = sources(**given)
    assert run_data.check_validation(args) == "there are no validation data: nothing is validated"
    assert args.eval_iters == 0


def test_the_index_of_data_on_a_read_only_file_system_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(disk))
    args = sources(data_cache_path=None, save=None, rank=0)
    with pytest.raises(UserError, match=f"--data-path {disk}/a: .* give --data-cache-path FOLDER"):
        run_data.choose_cache(args, [f"{disk}/a"])
    args.save = str(tmp_path)
    run_data.choose_cache(args, [f"{tmp_path}/b"])
    assert args.data_cache_path is None
    run_data.choose_cache(args, [f"{tmp_path}/b", f"{disk}/a"])
    assert args.data_cache_path == f"{tmp_path}/data_cache"
    with pytest.raises(UserError, match=f"--data-cache-path {disk}: cannot write in"):
        run_data.choose_cache(sources(data_cache_path=str(disk)), [])
