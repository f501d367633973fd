"""Legacy checkpoints convert to what the same weights in torch_dist convert to."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint import legacy
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.diagnostics import checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint, launch, legacy_checkpoint
from tests.checkpoint.test_dense_inputs import convert

BF16 = torch.bfloat16
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP 4 in one buffer": {"tensor_parallel": 4, "one_buffer": True},
    "PP 2 uneven": {"stages": ((0, 1), (2,))},
    "TP 2 PP 3": {"tensor_parallel": 2, "stages": ((0,), (1,), (2,))},
    "virtual stages": {"stages": ((0,), (1,), (2,), ()), "virtual": 2, "one_buffer": True},
    "Transformer Engine": {"tensor_parallel": 2, "transformer_engine": True},
    "bf16": {"tensor_parallel": 2, "values": dense_checkpoint.tensors(BF16), "one_buffer": True},
    "bias": dense_checkpoint.WITH_BIAS | {"tensor_parallel": 2},
    "not gated": dense_checkpoint.NOT_GATED | {"tensor_parallel": 2},
}


@pytest.mark.parametrize("chunk_bytes", [legacy.CHUNK_BYTES, 300], ids=["whole", "cut"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_converts_to_the_same_as_torch_dist(
    tmp_path: Path, layout: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, whatever the shards; also where they are cut into smaller chunks."""
    monkeypatch.setattr(legacy, "CHUNK_BYTES", chunk_bytes)
    options = LAYOUTS[layout]
    values = legacy_checkpoint.write(tmp_path / "legacy", **options)
    dense_checkpoint.write(tmp_path / "dense", values, args=options.get("args"))
    expected, found = (convert(tmp_path / name, tmp_path / f"moe {name}") for name in ("dense", "legacy"))
    dense_checkpoint.assert_same(found, expected)
    states = [set(open_checkpoint(tmp_path / f"moe {name}").objects) for name in ("dense", "legacy")]
    assert states[0] == states[1] - {"output_layer._extra_state/shard_0_1"}
    assert not proof.run(proof.prepare(tmp_path / "legacy", tmp_path / "moe legacy"))


def test_tied_embeddings(tmp_path: Path) -> None:
    """The last stage's copy of the embeddings goes, after a look whether it is one."""
    args = dense_checkpoint.arguments(untie_embeddings_and_output_weights=False)
    values = dense_checkpoint.tensors()
    values["output_layer.weight"] = values["embedding.word_embeddings.weight"]
    layout = {"tensor_parallel": 2, "stages": ((0, 1), (2,)), "args": args}
    legacy_checkpoint.write(tmp_path / "dense", values, **layout)
    assert "output_layer.weight" not in convert(tmp_path / "dense", tmp_path / "moe")
    values["output_layer.weight"] = values["output_layer.weight"] + 1
    legacy_checkpoint.write(tmp_path / "other", values, **layout)
    with pytest.raises(UserError, match="its copy of the tied embeddings differs"):
        open_checkpoint(tmp_path / "other")


def test_arguments_and_what_is_left_out(tmp_path: Path) -> None:
    legacy_checkpoint.write(tmp_path / "dense", tensor_parallel=2, one_buffer=True)
    convert(tmp_path / "dense", tmp_path / "moe")
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    left_out = {kind: entry["entries"] for kind, entry in record["left_out"].items()}
    assert left_out == {"optimizer": 4, "rng_state": 2}
    args = open_checkpoint(tmp_path / "moe").args
    assert args.num_experts == 4 and args.ckpt_format == "torch_dist" and args.consumed_train_samples == 0
    described = checkpoint.describe(tmp_path / "dense")
    assert "dense, iteration 8" in described and "decoder.layers.mlp.linear_fc1.weight" in described


def test_digest_is_of_the_values(tmp_path: Path) -> None:
    values = dense_checkpoint.tensors()
    legacy_checkpoint.write(tmp_path / "a", values)
    legacy_checkpoint.write(tmp_path / "b", values)
    values["decoder.final_layernorm.weight"][3] += 1
    legacy_checkpoint.write(tmp_path / "c", values)
    a, b, c = (open_checkpoint(tmp_path / name).digest() for name in "abc")
    assert a == b != c


FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.layers.1.input_layernorm.weight"
FILE = "model_optim_rng.pt"


def flip(path: Path) -> None:
    """Change one byte of a parameter's values and nothing else."""
    content = bytearray(path.read_bytes())
    value = torch.load(path, weights_only=False)["model"][FC1].detach().numpy().tobytes()
    content[content.index(value) + 5] ^= 1
    path.write_bytes(content)


def replace_pickle(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)


# What is done to the second rank's file, and what is said then.
DAMAGE: dict[str, tuple[Any, str]] = {
    "rank missing": (lambda path: path.unlink(), f"mp_rank_01/{FILE}: missing, damaged"),
    "rank too many": (lambda path: path.parent.with_name("mp_rank_02").mkdir(), "its 3 folders mp_rank_*"),
    "flipped value": (flip, "damaged at byte"),
    "pickle of nothing": (lambda path: replace_pickle(path, b""), "damaged or half-written"),
    "pickle of a list": (lambda path: replace_pickle(path, pickle.dumps([1])), "not a checkpoint"),
}
# What is done to the state in it; and, from "all" on, to that of both ranks.
CHANGES: dict[str, tuple[Any, str]] = {
    "norms differ": (lambda state: state["model"][NORM].data.add_(1), "linear_qkv.layer_norm_weight differs"),
    "other iteration": (lambda state: state.update(iteration=7), "of different iterations"),
    "parameter missing": (lambda state: state["model"].pop(FC1), "other parameters"),
    "before Megatron-Core": (lambda state: state.update(model={"language_model": {}}), "no model of Meg"),
    "no arguments": (lambda state: state.pop("args"), "not a checkpoint"),
    "no model": (lambda state: state.pop("model"), "no model of Meg"),
    "shapes differ": (lambda state: state["model"].update({FC1: torch.ones(4, 32)}), "not of one shape"),
    "integers": (lambda state: state["model"].update({FC1: torch.ones(2).int()}), "torch.int32, are no"),
    "columns": (lambda state: state["model"].update({FC1: torch.ones(32, 24).t()}), "lie row after row"),
    "all: layer without a parameter": (lambda state: state["model"].pop(FC1), "for 2 of 3 layers"),
    "all: unknown": (lambda state: state["model"].update(lora=torch.ones(2)), "holds 'lora', which"),
    "all: old order of QKV": (lambda state: state.update(checkpoint_version=1.0), "checkpoint_version 1.0"),
    "all: too many ranks": (
        lambda state: setattr(state["args"], "pipeline_model_parallel_size", 10**9),
        "pipeline parallel 1000000000",
    ),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *CHANGES])
def test_damage_is_one_line(tmp_path: Path, damage: str) -> None:
    legacy_checkpoint.write(tmp_path / "dense", tensor_parallel=2)
    change, message = (DAMAGE | CHANGES)[damage]
    for path in sorted((tmp_path / "dense").rglob(FILE))[not damage.startswith("all") :]:
        if damage in DAMAGE:
            change(path)
        else:
            state = torch.load(path, weights_only=False)
            change(state)
            torch.save(state, path)
    with pytest.raises(UserError) as raised:
        convert(tmp_path / "dense", tmp_path / "moe")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
def test_shards_that_megatron_saved(tmp_path: Path, dense: Path, dense_config: Path) -> None:
    """Megatron's own TP 2 x PP 2 shards and its torch_dist checkpoint of the same weights."""
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--pipeline-model-parallel-size", 2)
    save = ("--ckpt-convert-format", "torch", "--ckpt-convert-save", tmp_path)
    launch.ranks(4, "pretrain", "--config", dense_config, "--load", dense, *layout, *save).ok()
    saved = tmp_path / "torch"
    names = sorted(path.name for path in (saved / "iter_0000008").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    expected, found = open_checkpoint(dense), open_checkpoint(saved)
    assert {key: tensor.shape for key, tensor in found.tensors.items()} == {
        key: tensor.shape for key, tensor in expected.tensors.items() if "optimizer." not in key
    }
    options = Options(RouterConfig(router="linear", num_experts=4, pre_softmax=False))
    moe = {}
    for name, root in (("dense", dense), ("legacy", saved)):
        conversion.convert(conversion.prepare(root, tmp_path / name, options))
        moe[name] = dense_checkpoint.read_back(tmp_path / name / "release")
    dense_checkpoint.assert_same(moe["legacy"], moe["dense"])
