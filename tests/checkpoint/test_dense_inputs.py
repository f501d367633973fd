"""Dense torch_dist checkpoints of every layout convert to bitwise the same Mixture-of-Experts.

The layouts: as older PyTorch and Megatron wrote them, layers under keys of their own, by Transformer Engine.
"""

import io
import pickle
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.conversion import convert as conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.verify import proof
from tests import dense_checkpoint
from tests.dense_checkpoint import ATTENTION, FFN, LAYERS, MLP, make_stats

PREFIX = "decoder.layers."


def convert(
    root: Path, out: Path, layers: str | None = None, shared_expert: bool = False, **router: Any
) -> dict[str, torch.Tensor]:
    """Every tensor of the Mixture-of-Experts that ``root`` converts to."""
    stats = out.with_name("key_stats")
    make_stats(stats)
    config = RouterConfig(**{"num_experts": 4} | router)
    options = Options(config, (stats,), layers=layers, shared_expert=shared_expert)
    conversion.convert(conversion.prepare(root, out, options))
    return dense_checkpoint.read_back(out / "release")


def write_per_layer(
    root: Path, values: dict[str, torch.Tensor], tensor_parallel: int = 1, halves: bool = False
) -> None:
    """Layers under keys of their own; ``halves``: gate and up projection too (``singleton_local_shards``)."""
    folder = dense_checkpoint.Folder(root / "iter_0000008")

    def add(key: str, value: torch.Tensor) -> None:
        pieces = [1] * value.dim()
        if key.endswith(("linear_qkv.weight", "linear_fc1.weight", "weight_w", "weight_v")):
            pieces[0] = tensor_parallel * (1 if halves and "fc1" in key else 2)
        elif key.endswith(("linear_proj.weight", "linear_fc2.weight")):
            pieces[1] = tensor_parallel
        folder.add(key, value, tuple(pieces))
        folder.add(f"optimizer.state.exp_avg.{key}", value.float(), tuple(pieces))

    for key, value in values.items():
        if not key.startswith(PREFIX):
            add(key, value)
            continue
        for layer in range(LAYERS):
            name = f"{PREFIX}{layer}.{key.removeprefix(PREFIX)}"
            if halves and key == f"{MLP}.linear_fc1.weight":
                add(f"{name}_w", value[layer, :FFN])
                add(f"{name}_v", value[layer, FFN:])
            else:
                add(name, value[layer])
    for layer in range(LAYERS):
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            folder.add_object(f"{PREFIX}{layer}.{module}._extra_state/shard_0_1", None)
    state = {"args": dense_checkpoint.arguments(), "iteration": 8, "checkpoint_version": 3.0}
    folder.add_object("common_state/shard_0_1", state)
    folder.finish()


def old_pytorch(root: Path, values: dict[str, torch.Tensor]) -> None:
    """``.metadata`` as PyTorch wrote it before 2.3, which took these classes from elsewhere; common.pt."""
    dense_checkpoint.write(root, values, tensor_parallel=2, optimizer=True, common_file=True)
    path = root / "iter_0000008/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = OldTensorProperties(dtype=entry.properties.dtype)
    del metadata.storage_meta, metadata.version
    path.write_bytes(pickle.dumps(metadata))


def transformer_engine(root: Path, values: dict[str, torch.Tensor]) -> None:
    """Extra states that hold bytes."""
    folder = dense_checkpoint.Folder(root / "iter_0000008")
    for key, value in values.items():
        folder.add(key, value, (1,) * value.dim())
    for layer in range(LAYERS):
        for name in (f"{ATTENTION}.linear_qkv", f"{ATTENTION}.core_attention", f"{MLP}.linear_fc1"):
            folder.add_object(f"{name}._extra_state/shard_{layer}_{LAYERS}", io.BytesIO(b"scales"))
    folder.add_object("decoder.final_layernorm._extra_state/shard_0_1", torch.arange(9, dtype=torch.uint8))
    folder.add_object("common_state/shard_0_1", {"args": dense_checkpoint.arguments(), "iteration": 8})
    folder.finish()


INPUTS: dict[str, Any] = {
    "per layer, TP 2": partial(write_per_layer, tensor_parallel=2),
    "per layer, gate and up apart": partial(write_per_layer, halves=True),
    "old PyTorch and Megatron": old_pytorch,
    "Transformer Engine": transformer_engine,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", INPUTS)
def test_converts_to_the_same(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    values = dense_checkpoint.tensors(dtype)
    INPUTS[layout](tmp_path / "dense", values)
    dense_checkpoint.write(tmp_path / "plain", values)
    expected = convert(tmp_path / "plain", tmp_path / "moe plain")
    found = convert(tmp_path / "dense", tmp_path / "moe")
    dense_checkpoint.assert_same(found, expected)
    states = [set(open_checkpoint(tmp_path / name).objects) for name in ("moe", "moe plain")]
    assert states[0] | {"common_state/shard_0_1"} == states[1]
    assert not proof.run(proof.prepare(tmp_path / "dense", tmp_path / "moe"))


DIFFERENT = "is not of one shape and dtype in all layers"


@pytest.mark.parametrize(
    ("layer", "value", "message"),
    [
        (2, None, "is in layers 0, 1 and should be in layers 0, 1, 2"),
        (1, None, "is in layers 0, 2 and should be in layers 0, 1, 2"),
        (1, torch.ones(4, 4), DIFFERENT),
        (1, torch.ones(32, 24).bfloat16(), DIFFERENT),
    ],
    ids=["last missing", "one missing", "other shape", "other dtype"],
)
def test_layers_that_differ_are_refused(
    tmp_path: Path, layer: int, value: torch.Tensor | None, message: str
) -> None:
    folder = dense_checkpoint.Folder(tmp_path / "dense/iter_0000008")
    for number in range(LAYERS):
        folder.add(f"{PREFIX}{number}.mlp.linear_fc1.weight", torch.ones(4, 4), (1, 1))
        if number != layer or value is not None:
            stored = torch.ones(32, 24) if number != layer or value is None else value
            folder.add(f"{PREFIX}{number}.mlp.linear_fc2.weight", stored, (1, 1))
    folder.add_object("common_state/shard_0_1", {"args": Namespace()})
    folder.finish()
    with pytest.raises(UserError) as raised:
        convert(tmp_path / "dense", tmp_path / "moe")
    assert f"mlp.linear_fc2.weight {message}" in str(raised.value) and "\n" not in str(raised.value)
