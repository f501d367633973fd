"""``router-upcycle verify``: conversions pass, and whatever is changed in one afterwards is found."""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint import writer
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.publish import checks
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion import convert
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.steps import copy_of
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.verify import proof, values
from megatron_router_upcycling.verify.findings import SHOWN, Finding, Findings
from tests import dense_checkpoint
from tests.conversion.test_convert import EXPERTS, ROUTER
from tests.dense_checkpoint import ATTENTION, LAYERS, MLP, make_stats

N = 4
QKV = f"{ATTENTION}.linear_qkv.weight"
KINDS = {
    "embedding.word_embeddings.weight": "untouched",
    QKV: "untouched",
    f"{ATTENTION}.linear_qkv.bias": "untouched",
    f"{ATTENTION}.linear_proj.weight": "untouched",
    f"{MLP}.linear_fc1.layer_norm_weight": "untouched",
    "decoder.layers.pre_mlp_layernorm.weight": "norms",
    f"{EXPERTS}.linear_fc1.weight": "experts",
    f"{EXPERTS}.linear_fc2.weight": "experts",
    f"{ROUTER}.query_weight": "routers",
    f"{ROUTER}.expert_key": "routers",
}


class Conversion:
    """A folder with a dense checkpoint and what was converted from it. Whatever a test changes it undoes."""

    def __init__(self, folder: Path, materialize: bool = False) -> None:
        self.dense, self.moe, self.stats = folder / "dense", folder / "moe", folder / "ks"
        self.release = self.moe / "release"
        dense_checkpoint.write(self.dense)
        make_stats(self.stats)
        options = Options(RouterConfig(num_experts=N), (self.stats,), materialize=materialize)
        convert.convert(convert.prepare(self.dense, self.moe, options))

    def find(self) -> list[Finding]:
        """All that verify finds."""
        return list(proof.run(proof.prepare(self.dense, self.moe)).found)

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.moe)

    @contextlib.contextmanager
    def changed(self, path: Path, change: Callable[[bytearray], object]) -> Iterator[None]:
        """Change a file's bytes where they are, a hard link's too; undo it afterwards."""
        before = path.read_bytes()
        after = bytearray(before)
        change(after)
        assert after != before
        path.write_bytes(after)
        try:
            yield
        finally:
            path.write_bytes(before)

    @contextlib.contextmanager
    def metadata(self, change: Callable[[Any], object]) -> Iterator[None]:
        """Change ``.metadata``; the manifest records the new file's digest."""

        def edit(content: bytearray) -> None:
            metadata = pickle.loads(content)
            change(metadata)
            content[:] = pickle.dumps(metadata)

        with self.changed(self.release / ".metadata", edit), self.signed():
            yield

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> Any:
        """Change the manifest."""

        def edit(content: bytearray) -> None:
            record = json.loads(content)
            change(record)
            content[:] = json.dumps(record, indent=1).encode()

        return self.changed(self.moe / manifest.NAME, edit)

    def signed(self) -> Any:
        """Let the manifest record the files as they are now: no digest gives a change away."""

        def sign(record: dict[str, Any]) -> None:
            digests: dict[str, str] = {}
            with contextlib.suppress(Exception):  # where it cannot be read, that is what is found
                moe = open_checkpoint(self.moe, lambda key, what: None)
                identities = checks.examine_all(self.release, moe.tensors, moe.objects)
                digests = checks.content_digests(identities)
            for name, entry in (record["files"] | record["linked"]).items():
                path = self.moe / name
                entry["bytes"] = path.stat().st_size
                if "sha256" in entry:
                    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                else:
                    entry["content"] = digests.get(path.name, entry["content"])

        return self.manifest(sign)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def materialized(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("materialized"), materialize=True)


def test_experts_too_large_for_a_plain_zip_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch writes those, with the fields that larger archives need."""
    monkeypatch.setattr(writer, "ZIP32_LIMIT", 64)
    assert Conversion(tmp_path).find() == []


def test_the_table_says_what_was_proved(
    shared: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(shared.dense), str(shared.moe), "--json", str(tmp_path / "found.json")]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert said.count("  ok  ") == 10 and "as it must be" in said
    assert json.loads((tmp_path / "found.json").read_text())["equal"] is True
    assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out == ""

    blob = shared.checkpoint().blobs(f"{EXPERTS}.linear_fc2.weight")[0]
    with shared.changed(shared.release / blob.file, flip(blob, 1)):
        assert cli.main([*command, "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERENCES" in said and "1 WRONG   every expert bitwise equal" in said
    assert f"{EXPERTS}.linear_fc2.weight  0      0-3" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"] is False and found["differences"][0]["layer"] == "0"


def values_in(content: bytes, blob: Blob) -> slice:
    """Where a chunk's values lie in the content of its data file, by Python's zip module."""
    archive = content[blob.offset : blob.offset + blob.length]
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        info = next(info for info in opened.infolist() if "/data/" in info.filename)
    name_length, extra_length = struct.unpack_from("<HH", archive, info.header_offset + 26)
    begin = blob.offset + info.header_offset + 30 + name_length + extra_length
    return slice(begin, begin + info.file_size)


def flip(blob: Blob, place: int) -> Callable[[bytearray], None]:
    """Change a bit of one byte of a chunk's values."""

    def change(content: bytearray) -> None:
        found = values_in(bytes(content), blob)
        content[found.start + place % (found.stop - found.start)] ^= 0x10

    return change


def rewrite(blob: Blob, values: Callable[[bytes], bytes]) -> Callable[[bytearray], None]:
    """Change a chunk's values and the checksums beside them: nothing but the values gives it away."""

    def change(content: bytearray) -> None:
        found = values_in(bytes(content), blob)
        old, new = bytes(content[found]), values(bytes(content[found]))
        end = blob.offset + blob.length
        archive = content[blob.offset : end]
        checksums = [struct.pack("<I", zlib.crc32(value)) for value in (old, new)]
        assert archive.count(checksums[0]) >= 2
        content[blob.offset : end] = archive.replace(*checksums)
        content[found] = new

    return change


def negate_last(values: bytes) -> bytes:
    return values[:-1] + bytes([values[-1] ^ 0x80])


def named(found: list[Finding], check: str, key: str) -> list[Finding]:
    return [finding for finding in found if (finding.check, finding.name) == (check, key)]


@pytest.mark.parametrize("name", ["shared", "materialized"])
def test_one_changed_byte_is_found_in_every_chunk(name: str, request: pytest.FixtureRequest) -> None:
    """Its first byte, its last, or one between, in turn: the checksum finds it, as it does any change within
    32 bits; where DENSE does not share the bytes, the comparison finds it too."""
    random.seed(0)
    made = request.getfixturevalue(name)
    moe = made.checkpoint()
    seen: set[Blob] = set()
    for key, stored in moe.tensors.items():
        for chunk in stored.chunks:
            if chunk.blob in seen:
                continue
            place = (0, -1, random.randrange(1 << 16))[len(seen) % 3]
            seen.add(chunk.blob)
            linked = (made.release / chunk.blob.file).stat().st_nlink > 1
            with made.changed(made.release / chunk.blob.file, flip(chunk.blob, place)):
                found = made.find()
            layer = str(chunk.offsets[0]) if key.startswith("decoder.layers.") else ""
            (damage,) = named(found, "damage", key)
            assert "checksum" in damage.what and layer in damage.layer.split(",")
            if not linked:
                assert named(found, KINDS.get(key, "untouched"), key)
    assert len(seen) >= 30


@pytest.mark.parametrize("key", KINDS)
def test_values_that_hide_their_change_are_found(materialized: Conversion, key: str) -> None:
    """Other values with right checksums and digests: only comparing finds them."""
    made = materialized
    chunk = made.checkpoint().tensors[key].chunks[-1]
    path = made.release / chunk.blob.file
    with made.changed(path, rewrite(chunk.blob, negate_last)), made.signed():
        found = made.find()
    last = [offset + size - 1 for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
    same_bytes = {other for other in KINDS if chunk.blob in made.checkpoint().blobs(other)}
    assert {(finding.check, finding.name) for finding in found} == {(KINDS[k], k) for k in same_bytes}
    (difference,) = named(found, KINDS[key], key)
    assert difference.what == f"1 values differ, the first at {last}"
    if "experts" in key:
        assert (difference.layer, difference.expert) == (str(LAYERS - 1), str(N - 1))


def test_a_dense_checkpoint_that_was_written_over_in_place_is_found(shared: Conversion) -> None:
    """Training that saves the same iteration again: right checksums, and equal to DENSE, being linked."""
    key = f"{ATTENTION}.linear_proj.weight"
    blob = shared.checkpoint().blobs(key)[0]
    path = shared.dense / "iter_0000008" / blob.file
    with shared.changed(path, rewrite(blob, negate_last)):
        (found,) = shared.find()
    assert (found.check, found.name) == ("files", blob.file) and "chunks are not those" in found.what
    nan = rewrite(blob, lambda old: struct.pack("<f", float("nan")) + old[4:])
    with shared.changed(path, nan):
        assert named(shared.find(), "finite", key)


@pytest.fixture(scope="module")
def read_before(materialized: Conversion) -> dict[str, torch.Tensor]:
    return dense_checkpoint.read_back(materialized.release)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(file=st.integers(0, 99), place=st.integers(0, 1 << 30), mask=st.integers(1, 255))
def test_any_changed_byte_that_matters_is_found(
    materialized: Conversion, read_before: dict[str, torch.Tensor], file: int, place: int, mask: int
) -> None:
    """Anywhere in the data files, headers too: verify objects, or PyTorch reads what it read before."""
    made = materialized
    files = sorted(made.release.glob("*.distcp"))
    path = files[file % len(files)]

    def change(content: bytearray) -> None:
        content[place % len(content)] ^= mask

    with made.changed(path, change), made.signed():
        if not made.find():
            after = dense_checkpoint.read_back(made.release)
            assert all(torch.equal(value, after[key]) for key, value in read_before.items())


def indices(metadata: Any, key: str) -> list[Any]:
    found = [index for index in metadata.storage_data if index.fqn == key]
    return sorted(found, key=lambda index: index.offset or ())


def shift(metadata: Any, key: str) -> None:
    """One row down: a gap where it was, and an overlap or a place outside the tensor."""
    chunk = metadata.state_dict_metadata[key].chunks[0]
    index = next(i for i in indices(metadata, key) if i.offset == chunk.offsets)
    moved = torch.Size((chunk.offsets[0] + 1, *chunk.offsets[1:]))
    metadata.storage_data[replace(index, offset=moved)] = metadata.storage_data.pop(index)
    chunk.offsets = moved


def move_bytes(metadata: Any, key: str, offset: int, length: int = 0) -> None:
    info = metadata.storage_data[indices(metadata, key)[0]]
    info.offset, info.length = info.offset + offset, info.length + length


def swap(metadata: Any, key: str, first: int = 0, last: int = -1) -> None:
    """Exchange what the first and the last chunk hold: another layer's."""
    found, stored = indices(metadata, key), metadata.storage_data
    stored[found[first]], stored[found[last]] = stored[found[last]], stored[found[first]]


OF_ANY: dict[str, Callable[[Any, str], object]] = {
    "bytes removed": lambda metadata, key: metadata.storage_data.pop(indices(metadata, key)[-1]),
    "removed": lambda metadata, key: metadata.state_dict_metadata.pop(key),
    "bytes elsewhere": lambda metadata, key: move_bytes(metadata, key, 8),
    "bytes too many": lambda metadata, key: move_bytes(metadata, key, 0, 1),
    "bytes beyond the file": lambda metadata, key: move_bytes(metadata, key, 1 << 20),
}
OF_TENSORS: dict[str, Callable[[Any, str], object]] = {
    "a chunk removed": lambda metadata, key: metadata.state_dict_metadata[key].chunks.pop(),
    "chunks doubled": lambda metadata, key: metadata.state_dict_metadata[key].chunks.__imul__(2),
    "a chunk shifted": shift,
    "chunks swapped": swap,
    "another dtype": lambda metadata, key: setattr(
        metadata.state_dict_metadata[key].properties, "dtype", torch.bfloat16
    ),
}
STATES = (
    f"{ATTENTION}.linear_qkv._extra_state/shard_1_3",
    f"{EXPERTS}.linear_fc1._extra_state/shard_1.2_3.4",
)


@pytest.mark.parametrize(
    ("key", "change"),
    [*itertools.product([QKV, *list(KINDS)[5:]], OF_ANY | OF_TENSORS), *itertools.product(STATES, OF_ANY)],
)
def test_changed_places_are_found(shared: Conversion, change: str, key: str) -> None:
    if change == "chunks swapped" and len(shared.checkpoint().tensors[key].chunks) < 2:
        return
    with shared.metadata(lambda metadata: (OF_ANY | OF_TENSORS)[change](metadata, key)):
        found = shared.find()
    assert key in {finding.name for finding in found}, found


def test_entries_without_a_place_are_found(shared: Conversion) -> None:
    def change(metadata: Any) -> None:
        for old, new in (("output_layer.weight", "optimizer.output_layer"), (QKV, "surprise")):
            metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
            for index in indices(metadata, old):
                metadata.storage_data[replace(index, fqn=new)] = metadata.storage_data[index]

    with shared.metadata(change):
        assert {f.name for f in shared.find()} == {"optimizer.output_layer", "surprise"}


@contextlib.contextmanager
def change_common(change: Callable[[dict[str, Any]], object], made: Conversion) -> Iterator[None]:
    """Change the common state: written anew at the end of its file, as Megatron would write it."""
    path = made.release / made.checkpoint().objects["common_state/shard_0_1"].file
    state, size, buffer = made.checkpoint().common, path.stat().st_size, io.BytesIO()
    change(state)
    torch.save([state], buffer)

    def point(metadata: Any) -> None:
        info = metadata.storage_data[indices(metadata, "common_state/shard_0_1")[0]]
        info.offset, info.length = size, len(buffer.getvalue())

    with made.changed(path, lambda content: content.extend(buffer.getvalue())), made.metadata(point):
        yield


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda state: setattr(state["args"], "num_experts", 8), "num_experts"),
        (lambda state: setattr(state["args"], "moe_router_topk", 1), "moe_router_topk"),
        (lambda state: setattr(state["args"], "rotary_base", 1e6), "rotary_base"),
        (lambda state: setattr(state["args"], "consumed_train_samples", 512), "consumed_train_samples"),
        (lambda state: setattr(state["args"], "surprise", 1), "surprise"),
        (lambda state: delattr(state["args"], "swiglu"), "swiglu"),
        (lambda state: state.update(iteration=8), "iteration"),
        (lambda state: state.update(optimizer={}), "optimizer"),
        (lambda state: state.pop("args"), "common_state/shard_0_1"),
    ],
)
def test_changed_arguments_are_found(shared: Conversion, change: Any, name: str) -> None:
    with change_common(change, shared):
        found = shared.find()
    assert ("arguments", name) in {(f.check, f.name) for f in found}, found


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda record: record["model"].update(rotary_base=5), "rotary_base"),
        (lambda record: record["router"].update(top_k=3), "moe_router_topk"),
        (lambda record: record["router"].update(num_routers=2), f"{ROUTER}.query_weight"),
        (lambda record: record["files"].popitem(), "metadata.json"),
        (lambda record: record["linked"].popitem(), "__0_0.distcp"),
    ],
)
def test_a_changed_manifest_is_found(shared: Conversion, change: Any, name: str) -> None:
    with shared.manifest(change):
        assert name in {finding.name for finding in shared.find()}


def test_missing_and_other_files_are_found(tmp_path: Path) -> None:
    made = Conversion(tmp_path)
    with made.changed(made.release / "metadata.json", lambda content: content.append(0x20)):
        assert [(f.check, f.name) for f in made.find()] == [("files", "metadata.json")]
    for name in ("__0_0.distcp", "__upcycled_0.distcp"):
        path = made.release / name
        path.rename(tmp_path / "aside")
        found = {(f.check, f.name) for f in made.find()}
        assert {("metadata", name), ("files", name)} <= found and "damage" in dict(found)
        (tmp_path / "aside").rename(path)
    (made.release / "__7_0.distcp").write_bytes(b"")
    assert [(f.check, f.name) for f in made.find()] == [("files", "__7_0.distcp")]


def test_another_dense_checkpoint_differs(shared: Conversion, tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense", {k: -v for k, v in dense_checkpoint.tensors().items()}, 2)
    found = proof.run(proof.prepare(tmp_path / "dense", shared.moe, (shared.stats,)))
    checks = {finding.check for finding in found.found}
    assert {"experts", "untouched", "norms", "routers", "arguments"} <= checks
    hidden = sum(max(0, len(found.of(check)) - SHOWN) for check in checks)
    assert hidden and f"\nand {hidden} more; " in found.table()


def test_other_key_statistics_differ(shared: Conversion, tmp_path: Path) -> None:
    stats = make_stats(tmp_path / "ks")
    assert stats.attended is not None
    stats.attended[1] *= 2  # the same groups of heads
    key_stats_file.save(tmp_path / "ks", stats, overwrite=True)
    found = proof.run(proof.prepare(shared.dense, shared.moe, (tmp_path / "ks",))).found
    assert {(f.name, f.layer) for f in found} == {(str(tmp_path / "ks"), ""), (f"{ROUTER}.expert_key", "1")}


def train(made: Conversion, root: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Conversion:
    """What training saves: other values, other chunks, one name of the norm, an optimizer's state."""
    trained = copy.copy(made)
    trained.moe, trained.release = root, root / "iter_0000005"
    tensors = {key: value + 0.5 for key, value in dense_checkpoint.read_back(made.release).items()}
    del tensors["decoder.layers.pre_mlp_layernorm.weight"]
    change(tensors)
    folder = dense_checkpoint.Folder(trained.release)
    for key, value in tensors.items():
        folder.add(key, value, (value.shape[0], *[1] * (value.dim() - 1)))
        folder.add(f"optimizer.state.exp_avg.{key}", value, (1,) * value.dim())
    common = made.checkpoint().common
    common["args"].iteration = common["iteration"] = 5
    common["args"].consumed_train_samples = 99
    folder.add_object("common_state/shard_0_1", common)
    folder.finish()
    shutil.copy(made.moe / manifest.NAME, root)
    return trained


def test_of_a_trained_checkpoint_the_structure_is_proved(
    shared: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(shared, tmp_path / "run", lambda tensors: None)
    assert cli.main(["verify", str(trained.dense), str(trained.moe)]) == 0
    said = capsys.readouterr().out
    assert "trained to iter_0000005: values not compared" in said and said.count("not made") == 6
    blob = trained.checkpoint().blobs(f"{EXPERTS}.linear_fc1.weight")[1]
    with trained.changed(trained.release / blob.file, flip(blob, 77)):
        assert {f.check for f in trained.find()} == {"damage"}
    key = f"{EXPERTS}.linear_fc2.weight"
    for name, check, change in (
        (f"{ROUTER}.expert_key", "routers", lambda tensors: tensors.pop(f"{ROUTER}.expert_key")),
        (key, "experts", lambda tensors: tensors.update({key: tensors[key][:, :2]})),
    ):
        broken = train(shared, tmp_path / check, change)
        assert {(f.check, f.name) for f in broken.find()} == {(check, name)}


def test_mistakes_are_one_line(
    shared: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*args: object) -> str:
        assert cli.main(["verify", *map(str, args)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        return said.err

    assert "no checkpoint there" in message(tmp_path / "none", shared.moe)
    assert "no checkpoint there" in message(shared.dense, tmp_path / "none")
    assert "router_upcycling.json" in message(shared.dense, shared.dense)
    assert "a Mixture-of-Experts already" in message(shared.moe, shared.moe)
    moved = shared.stats.rename(shared.stats.with_name("moved"))
    assert "is gone" in message(shared.dense, shared.moe)
    moved.rename(shared.stats)
    assert "--key-stats" in message(shared.dense, shared.moe, "--key-stats", tmp_path / "none")
    with shared.changed(shared.release / ".metadata", lambda content: content.__delitem__(slice(50, None))):
        assert ".metadata: damaged" in message(shared.dense, shared.moe)
    assert "--json" in message(shared.dense, shared.moe, "--json", tmp_path)
    for change in (
        {"seed": "7"}, {"files": []}, {"linked": {"a": 1}}, {"files": {"../a": {}}}, {"source": None},
        {"model": 3}, {"key_stats": None}, {"router": None}, {"router": {"num_experts": "8"}}, {"format": 9},
    ):  # fmt: skip
        with shared.manifest(lambda record, change=change: record.update(change)):  # type: ignore[misc]
            assert "convert" in message(shared.dense, shared.moe) or "router" in change
    with shared.manifest(lambda record: record["router"].update(router="hyperbolic")):
        assert "hyperbolic: choose one of mixture" in message(shared.dense, shared.moe)


@pytest.mark.parametrize("block", [24, 1 << 20])
def test_chunks_of_another_grid_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Whatever boxes the two checkpoints store a tensor in: rows here, columns and all layers there."""
    monkeypatch.setattr(values, "BLOCK_BYTES", block)
    tensor = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    changed = tensor.clone()
    changed[2, 3, 5] *= -1
    stored = {"rows": (tensor, (4, 3, 1)), "columns": (tensor, (1, 1, 4)), "cells": (changed, (2, 2, 2))}
    for name, (value, pieces) in stored.items():
        folder = dense_checkpoint.Folder(tmp_path / name / "iter_0000008")
        folder.add("w", value, pieces)
        folder.add_object("common_state/shard_0_1", {"args": dense_checkpoint.arguments()})
        folder.finish()
    for one, other in itertools.permutations(stored, 2):
        source, target = (open_checkpoint(tmp_path / name / "iter_0000008") for name in (one, other))
        found, read = Findings(), list[int]()
        comparison = values.Comparison(target, values.Sources(source), found, read.append)
        comparison.compare("w", copy_of(source, "w", "untouched"))
        assert sum(read) == tensor.nbytes
        said = [finding.what for finding in found.found]
        assert said == ["1 values differ, the first at [2, 3, 5]"] * ("cells" in (one, other))
