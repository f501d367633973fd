"""Data and model are held against each other before the first step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_router_upcycling import cli
from megatron_router_upcycling.data import agreement, record
from megatron_router_upcycling.data.publish import HEADER
from megatron_router_upcycling.errors import UserError
from tests import launch
from tests.hf.folders import write_tokenizer


def write(prefix: Path, *documents: list[int], dtype: type = np.int32) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("a b c d e f")
    flags = ("--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "data", "--quiet")
    assert cli.main(["prepare-data", *map(str, (tmp_path / "a.txt", *flags))]) == 0
    return tmp_path / "data"


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_token_beyond_the_vocabulary_is_named(tmp_path: Path, dtype: type) -> None:
    prefix = write(tmp_path / "data", [5, 300, 7], dtype=dtype)
    agreement.check([prefix], None, 301)
    named = r"data: holds token 300, and the model's vocabulary has 300 \(0 to 299"
    with pytest.raises(UserError, match=named):
        agreement.check([prefix], None, 300)


def test_of_large_files_the_beginning_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "LOOKED_AT", 16)
    agreement.check([write(tmp_path / "fifth", [1, 1, 1, 1, 99])], None, 50)
    with pytest.raises(UserError, match="holds token 99"):
        agreement.check([write(tmp_path / "fourth", [1, 1, 1, 99, 1])], None, 50)


def test_other_tokenizer_is_named_with_the_way_out(prepared: Path, tmp_path: Path) -> None:
    given, other, path = tmp_path / "tokenizer", tmp_path / "other", record.path_of(prepared)
    write_tokenizer(other)
    for place in (given, other, None):  # a copy gives the same tokens
        agreement.check([str(prepared)], place, 28)
    smaller = r"made with another tokenizer \(.*, vocabulary 28\) than the model's \(.*, 27\)"
    with pytest.raises(UserError, match=smaller):
        agreement.check([str(prepared)], given, 27)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"z"', '"Z"'))
    with pytest.raises(UserError, match=r"another tokenizer .*or remove .*data\.json"):
        agreement.check([str(prepared)], other, 28)
    entries = json.loads(path.read_text()) | {"format": 1, "tokenizer_sha256": "of files"}
    path.write_text(json.dumps(entries))  # which says nothing of the tokenizer
    agreement.check([str(prepared)], other, 28)
    with pytest.raises(UserError, match=smaller):
        agreement.check([str(prepared)], given, 27)
    path.unlink()
    agreement.check([str(prepared)], other, 28)


def without_a_length(index: bytes) -> bytes:
    return index[: HEADER.size + 4] + bytes(4) + index[HEADER.size + 8 :]


def test_index_and_tokens_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2], [3, 4, 5])
    tokens, index = ((tmp_path / f"data{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    other = Path(f"{write(tmp_path / 'other', [1, 2, 3])}.idx").read_bytes()
    agreement.check([str(tmp_path / "data")], None, 6)
    for new_tokens, new_index, message in (
        (tokens[:12], index, "it counts 20 bytes of tokens, and the .bin has 12"),
        (tokens + bytes(4), index, "it counts 20 bytes of tokens, and the .bin has 24"),
        (tokens, other, "it counts 12 bytes of tokens, and the .bin has 20"),
        (tokens, without_a_length(index), "it counts 8 bytes of tokens, and the .bin has 20"),
        (tokens, index[:50], ""),
        (tokens, b"other", ""),
        (tokens, b"MMIDIDX\0\0\2" + bytes(57), ""),  # another version
        (tokens, b"MMIDIDX\0\0\1" + bytes(7) + b"\x63" + bytes(50), ""),  # an unknown dtype
    ):
        (tmp_path / "data.bin").write_bytes(new_tokens)
        (tmp_path / "data.idx").write_bytes(new_index)
        with pytest.raises(UserError, match=rf"data\.idx: is no index of Megatron data, .*{message}"):
            agreement.check([str(tmp_path / "data")], None, 6)


def test_a_pair_beside_the_record_of_other_data_is_named(prepared: Path, tmp_path: Path) -> None:
    write(prepared, [1, 2, 3], dtype=np.uint16)
    with pytest.raises(UserError, match=r"it has 1 documents of 3 tokens, and the record says 1 of \d"):
        agreement.check([str(prepared)], None, 28)


def test_training_and_key_collection_refuse_it_in_one_line(
    tmp_path: Path, moe_config: Path, moe: Path
) -> None:
    prefix = write(tmp_path / "data", [1, 2, 5000] * 400)
    flags = ("--config", moe_config, "--load", moe, "--save", tmp_path / "run", "--train-iters", 1)
    output = launch.python("-m", "megatron_router_upcycling.pretrain", *flags, "--data-path", prefix)
    assert output.returncode == 2 and len(output.errors) == 1 and "Traceback" not in output.text
    assert f"--data-path {prefix}: holds token 5000" in output.errors[0]
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()
