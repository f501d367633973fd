"""What the converter makes and refuses. ``verify/test_starts`` holds every start against slow code."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.open import open_checkpoint, open_dense
from megatron_router_upcycling.checkpoint.read_model import query_key_digest
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.convert import EXPERT_FILE
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from tests import dense_checkpoint
from tests.dense_checkpoint import ATTENTION, FFN, GROUPS, LAYERS, MLP, is_ffn, make_stats

EXPERTS = f"{MLP}.experts.experts"
ROUTER = f"{MLP}.router"


def convert(
    tmp_path: Path, options: Options | None = None, init: InitConfig | None = None, **router: Any
) -> Path:
    """Convert ``tmp_path/dense``; the new iteration's folder."""
    if options is None:
        stats = tmp_path / "key_stats.safetensors"
        make_stats(stats)
        options = Options(RouterConfig(**router), (stats,), init=init or InitConfig())
    out = tmp_path / "moe"
    conversion.convert(conversion.prepare(tmp_path / "dense", out, options))
    return out / "release"


def test_new_bytes_do_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    dense = dense_checkpoint.write(tmp_path / "dense", dense_checkpoint.tensors(torch.bfloat16))
    checkpoint = open_checkpoint(tmp_path / "dense")
    ffn_on_disk = sum(checkpoint.stored_bytes(key) for key in dense if is_ffn(key))
    for n in (8, 64):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "dense").symlink_to(tmp_path / "dense")
        release = convert(tmp_path / str(n), num_experts=n, num_routers=4)
        assert (release / EXPERT_FILE).stat().st_size <= ffn_on_disk
        linked = [path.name for path in release.iterdir() if path.stat().st_nlink > 1]
        assert linked == ["__0_0.distcp"]


def test_materialized_shares_nothing(tmp_path: Path) -> None:
    """What shares bytes is held against the reference in ``verify/test_starts``."""
    dense = dense_checkpoint.write(tmp_path / "dense", tensor_parallel=4, optimizer=True, extra_states=False)
    stats = tmp_path / "key_stats.safetensors"
    make_stats(stats)
    release = convert(tmp_path, Options(RouterConfig(num_experts=4), (stats,), materialize=True))
    made = dense_checkpoint.read_back(release)
    assert all(path.stat().st_nlink == 1 for path in release.iterdir())
    moe = open_checkpoint(tmp_path / "moe")
    for key in filter(is_ffn, dense):
        name = EXPERTS + key.removeprefix(MLP)
        blobs = moe.blobs(name)
        assert len(set(blobs)) == len(blobs)
        assert made[name].shape[1] == 4 and (made[name] == dense[key].unsqueeze(1)).all()
    others = [key for key in dense if not is_ffn(key)]
    assert others and all(torch.equal(made[key], dense[key]) for key in others)
    assert not manifest.read(tmp_path / "moe")["shared_storage"]  # type: ignore[index]


def test_common_state_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As Megatron kept it before 0.19; it goes where it was."""
    dense_checkpoint.write(tmp_path / "dense", common_file=True)
    assert (convert(tmp_path, num_experts=4) / "common.pt").is_file()
    moe = open_checkpoint(tmp_path / "moe")
    assert moe.args.num_experts == 4 and "common_state/shard_0_1" not in moe.objects


def test_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        dense_checkpoint.write(tmp_path / name / "dense")
        convert(tmp_path / name, num_experts=4)
    for path in sorted((tmp_path / "a/moe/release").iterdir()):
        assert path.read_bytes() == (tmp_path / "b/moe/release" / path.name).read_bytes(), path.name


def test_extra_states_and_training_state(tmp_path: Path) -> None:
    """What Megatron looks for with and without Transformer Engine; no optimizer, no random state."""
    dense_checkpoint.write(tmp_path / "dense", optimizer=True)
    convert(tmp_path, num_experts=2)
    moe = open_checkpoint(tmp_path / "moe")
    layers = [f"_extra_state/shard_{layer}_{LAYERS}" for layer in range(LAYERS)]
    experts = [f"_extra_state/shard_{layer}.{e}_{LAYERS}.2" for layer in range(LAYERS) for e in range(2)]
    expected = {"common_state/shard_0_1", "decoder.final_layernorm._extra_state/shard_0_1"}
    for module in (f"{ATTENTION}.linear_qkv", f"{ATTENTION}.linear_proj", f"{ATTENTION}.core_attention"):
        expected |= {f"{module}.{state}" for state in layers}
    expected |= {f"decoder.layers.pre_mlp_layernorm.{state}" for state in layers}
    for name in ("linear_fc1", "linear_fc2"):
        expected |= {f"{EXPERTS}.{name}.{state}" for state in experts}
    assert set(moe.objects) == expected
    assert not [key for key in moe.tensors if "optimizer" in key]
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    left_out = {kind: (entry["entries"], bool(entry["reason"])) for kind, entry in record["left_out"].items()}
    assert left_out == {"optimizer": (10, True), "rng_state": (1, True)}


def test_common_state_is_that_of_a_fresh_run(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    convert(tmp_path, num_experts=4, top_k=3, pre_softmax=False)
    common = open_checkpoint(tmp_path / "moe").common
    assert set(common) == {
        "args", "checkpoint_version", "content_metadata", "iteration", "num_floating_point_operations_so_far"
    }  # fmt: skip
    assert common["iteration"] == 0
    args, dense = vars(common["args"]), vars(dense_checkpoint.arguments())
    changed = {"num_experts": 4, "moe_router_topk": 3, "moe_router_pre_softmax": False}
    changed["moe_ffn_hidden_size"] = FFN
    assert {name: args[name] for name in changed} == changed
    assert args["consumed_train_samples"] == args["iteration"] == 0
    assert "moe_grouped_gemm" not in args
    same = set(dense) - set(changed) - {"consumed_train_samples", "iteration", "moe_grouped_gemm"}
    assert {name: args[name] for name in same} == {name: dense[name] for name in same}


def test_manifest_records_what_made_it(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense")
    convert(tmp_path, num_experts=4)
    record = manifest.read(tmp_path / "moe")
    assert record is not None
    assert manifest.router_config(record, "manifest") == RouterConfig(num_experts=4, num_routers=4)
    assert record["source"]["digest"] == open_checkpoint(tmp_path / "dense").digest()
    assert record["model"]["num_query_groups"] == GROUPS and record["model"]["norm_epsilon"] == 1e-6
    assert set(record["files"]) == {
        f"release/{name}"
        for name in (".metadata", "metadata.json", "__upcycled_0.distcp", "__upcycled_1.distcp")
    }
    assert record["key_stats"]["metadata"]["key_source"] == "pre_rope"
    assert set(record["versions"]) == {"python", "torch", "megatron-core", "megatron-router-upcycling"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": dense_checkpoint.arguments(num_experts=8)}, "a Mixture-of-Experts already"),
        ({"args": dense_checkpoint.arguments(multi_latent_attention=True)}, "--multi-latent-attention True"),
        ({"args": dense_checkpoint.arguments(attention_output_gate=True)}, "--attention-output-gate True"),
        ({"args": dense_checkpoint.arguments(mtp_num_layers=1)}, "--mtp-num-layers 1"),
        ({"args": dense_checkpoint.arguments(hidden_size=64)}, "linear_qkv.weight is [3, 64, 32]"),
        ({"args": dense_checkpoint.arguments(num_query_groups=8)}, "linear_qkv.weight is [3, 64, 32]"),
        ({"args": dense_checkpoint.arguments(swiglu=False)}, "linear_fc1.weight is [3, 48, 32]"),
        ({"args": dense_checkpoint.arguments(num_query_groups=3)}, "3 query groups do not divide 8"),
        ({"args": dense_checkpoint.arguments(kv_channels=None)}, "do not give the architecture"),
        ({"args": {"num_layers": 3}}, "no training arguments of Megatron's, no run_config.yaml"),
        ({"args": dense_checkpoint.arguments(mask=torch.ones(2))}, "hold what cannot be carried over"),
        ({"values": dense_checkpoint.tensors() | {"surprise": torch.ones(2)}}, "holds surprise"),
        ({"values": {f"{EXPERTS}.linear_fc1.weight": torch.ones(3, 2, 2)}}, "a Mixture-of-Experts already"),
        ({"values": {"embedding.word_embeddings.weight": torch.ones(2, 2)}}, "has no tensor"),
    ],
)
def test_what_is_not_a_dense_gpt_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    dense_checkpoint.write(tmp_path / "dense", extra_states=False, **changes)
    with pytest.raises(UserError) as raised:
        convert(tmp_path, num_experts=4)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "key_stats.safetensors"]


def test_key_statistics_of_this_checkpoint_are_taken_and_of_one_with_other_values_not(tmp_path: Path) -> None:
    values = dense_checkpoint.tensors()
    dense_checkpoint.write(tmp_path / "dense", values)
    dense = open_dense(tmp_path / "dense")
    make_stats(tmp_path / "ks", checkpoint_digest=dense.digest(), query_key_digest=query_key_digest(dense))
    options = Options(RouterConfig(), (tmp_path / "ks",))
    conversion.prepare(tmp_path / "dense", tmp_path / "moe", options)

    for name, value in (("hidden_size", 16), ("checkpoint_digest", "0" * 64)):
        make_stats(tmp_path / "ks", **{name: value})
        with pytest.raises(UserError, match=f"another model or other keys: its {name} is {value}"):
            conversion.prepare(tmp_path / "dense", tmp_path / "moe", options)
    make_stats(tmp_path / "ks", checkpoint_digest=dense.digest(), query_key_digest=query_key_digest(dense))

    # Trained on from the same shapes: the index and the common state are the same to the last byte.
    shutil.rmtree(tmp_path / "dense")
    values[dense_checkpoint.ATTENTION + ".linear_qkv.weight"][2, 0, 0] += 1e-3
    dense_checkpoint.write(tmp_path / "dense", values)
    assert open_checkpoint(tmp_path / "dense").digest() == dense.digest()
    with pytest.raises(UserError, match="its query_key_digest is"):
        conversion.prepare(tmp_path / "dense", tmp_path / "moe", options)


def test_key_statistics_that_the_models_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    dense_checkpoint.write(tmp_path / "dense", dense_checkpoint.tensors(torch.float16))
    stats = make_stats(tmp_path / "ks")
    assert stats.attended is not None
    stats.attended[1, 0, 0] = 1e6
    key_stats_file.save(tmp_path / "ks", stats, overwrite=True)
    with pytest.raises(UserError, match="too large for torch.float16 in layer 1"):
        convert(tmp_path, Options(RouterConfig(num_experts=4), (tmp_path / "ks",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ks"]
