"""Reading and writing torch_dist folders by chunk, and reading them safely."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.format import safe_pickle, torch_save_file
from megatron_router_upcycling.checkpoint.format.metadata import (
    Blob,
    Chunk,
    StoredTensor,
    format_metadata,
    parse_metadata,
)
from megatron_router_upcycling.checkpoint.format.torch_save_file import Values
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError
from tests import dense_checkpoint
from tests.dense_checkpoint import ATTENTION, MLP


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_are_read_as_pytorch_reads_them(
    tmp_path: Path, tensor_parallel: int, dtype: torch.dtype
) -> None:
    values = dense_checkpoint.write(tmp_path, dense_checkpoint.tensors(dtype), tensor_parallel)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(values)
    scratch = bytearray(1 << 16)
    for key in (f"{ATTENTION}.linear_qkv.weight", f"{MLP}.linear_fc2.weight"):
        for layer in range(dense_checkpoint.LAYERS):
            assert torch.equal(checkpoint.read_layer(key, layer, scratch), values[key][layer])
            assert torch.equal(checkpoint.read_layer(key, layer, bytearray()), values[key][layer])


def test_metadata_survives_writing_and_reading() -> None:
    chunks = tuple(Chunk((i, j, 0), (1, 1, 4), Blob("a", i, 8)) for i in range(2) for j in range(3))
    norm = StoredTensor((4,), torch.float32, (Chunk((0,), (4,), Blob("b", 7, 16)),))
    tensors = {"experts": StoredTensor((2, 3, 4), torch.bfloat16, chunks), "norm": norm}
    objects = {"state/shard_0_1": Blob("b", 0, 7)}
    content = format_metadata(tensors, objects)
    assert parse_metadata(content, "metadata") == (tensors, objects)
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    metadata = pickle.loads(content)
    assert isinstance(metadata, Metadata)
    assert metadata.storage_data[MetadataIndex("experts", (1, 2, 0))].offset == 1
    assert metadata.state_dict_metadata["norm"].properties.layout is torch.strided


def examine(folder: Path, tensor: torch.Tensor, sizes: tuple[int, ...]) -> tuple[bytes, Values | None]:
    """A file of ``tensor`` in ``folder``, between other bytes, and where its values lie."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    content = b"before" + buffer.getvalue() + b"after"
    (folder / "a").write_bytes(content)
    blob = Blob("a", 6, len(buffer.getvalue()))
    return content, torch_save_file.examine(folder, blob, (sizes, tensor.dtype)).values


@pytest.mark.parametrize("dtype", list(torch_save_file.STORAGES.values()), ids=str)
def test_values_given_another_shape_are_what_torch_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    saved, values = examine(tmp_path, tensor, (2, 3, 4))
    assert values is not None
    head, tail = torch_save_file.wrap_values(values, (2, 1, 3, 4), dtype)
    content = head + saved[values.offset : values.offset + values.length] + tail
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded, tensor.view(2, 1, 3, 4))
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None  # the checksums are right


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 6).t(), torch.ones(9, 4)[:6], torch.nn.Parameter(torch.ones(6, 4))],
    ids=["transposed", "part", "parameter"],
)
def test_values_that_are_not_plain_are_not_taken(tmp_path: Path, tensor: torch.Tensor) -> None:
    assert examine(tmp_path, tensor, (6, 4))[1] is None
    with pytest.raises(torch_save_file.Damaged, match="holds torch.float32"):
        examine(tmp_path, torch.ones(6, 4), (4, 6))


def test_writer_copies_where_it_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = dense_checkpoint.write(tmp_path / "dense")
    checkpoint = open_checkpoint(tmp_path / "dense")

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    with CheckpointWriter(tmp_path / "copy") as writer:
        for key in (*checkpoint.tensors, *checkpoint.objects):
            writer.take_over(checkpoint, key, key)
        writer.finish()
    dense_checkpoint.assert_same(dense_checkpoint.read_back(tmp_path / "copy"), values)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "copy").iterdir())


def test_records_are_written_back_under_their_names() -> None:
    from megatron.core.transformer.enums import AttnBackend

    seen = safe_pickle.loads(pickle.dumps({"backend": AttnBackend.flash, "dtype": torch.bfloat16}), "state")
    assert not isinstance(seen["backend"], AttnBackend)
    assert pickle.loads(safe_pickle.dumps(seen)) == {"backend": AttnBackend.flash, "dtype": torch.bfloat16}


SPOILT = {  # a file's content in place of what it has (None: it is removed), and what is said then
    ("latest_checkpointed_iteration.txt", None): "no checkpoint there",
    ("latest_checkpointed_iteration.txt", b"9"): "iter_0000009: no checkpoint there",
    ("latest_checkpointed_iteration.txt", b"../x"): "says '../x'",
    (".metadata", None): ".metadata: cannot be read (No such file",
    (".metadata", b""): ".metadata: damaged or half-written",
    ("metadata.json", None): "metadata.json: cannot be read (No such file",
    ("metadata.json", b"{"): "metadata.json: not JSON",
    ("metadata.json", b'{"sharded_backend": "zarr"}'): "format 'zarr'",
    ("__1_0.distcp", None): "distcp: missing",
    ("__1_0.distcp", b"PK"): "distcp: half-written",
}


@pytest.mark.parametrize(("file", "content"), SPOILT)
def test_what_is_not_whole_is_one_line(tmp_path: Path, file: str, content: bytes | None) -> None:
    dense_checkpoint.write(tmp_path, tensor_parallel=2)
    (path,) = tmp_path.rglob(file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        open_checkpoint(tmp_path)
    assert SPOILT[file, content] in str(raised.value) and "\n" not in str(raised.value)


def test_an_iterations_folder_chooses_that_iteration(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path)
    shutil.copytree(tmp_path / "iter_0000008", tmp_path / "iter_0000004")
    older = open_checkpoint(tmp_path / "iter_0000004")
    assert (older.root, older.iteration_dir.name) == (tmp_path, "iter_0000004")
    assert open_checkpoint(tmp_path).iteration_dir.name == "iter_0000008"
    with pytest.raises(
        UserError, match=r"iter_0000006: no checkpoint there; .* \(iter_0000004, iter_0000008\)"
    ):
        open_checkpoint(tmp_path / "iter_0000006")


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [("../../secret", 2, "outside the checkpoint's folder"), ("a", 1, "not covered by its chunks")],
)
def test_metadata_that_leads_elsewhere_or_nowhere_is_refused(file: str, size: int, message: str) -> None:
    stored = StoredTensor((2, 4), torch.float32, (Chunk((0, 0), (size, 4), Blob(file, 0, 32)),))
    with pytest.raises(UserError, match=message):
        parse_metadata(format_metadata({"norm": stored}, {}), "metadata")
