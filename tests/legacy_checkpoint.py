"""Small legacy checkpoints (``--ckpt-format torch``), cut into shards as Megatron's modules cut parameters.

Independent of the package. ``test_legacy.py`` compares with files that Megatron itself has written.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests import dense_checkpoint

LAYERS = "decoder.layers."
# As a layer without Transformer Engine calls the norms that the others hold in the linear layer behind them.
APART = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def shard(key: str, value: torch.Tensor, rank: int, size: int, gated: bool) -> torch.Tensor:
    """One tensor-parallel rank's part of a parameter without layer axis."""
    if "layer_norm" in key or "layernorm" in key:
        return value
    if "linear_fc1." in key and gated:
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if any(name in key for name in ("linear_qkv.", "linear_fc1.", "word_embeddings.", "output_layer.")):
        return value.chunk(size)[rank]
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(size, dim=1)[rank]
    return value


def write(
    root: Path,
    values: dict[str, torch.Tensor] | None = None,
    tensor_parallel: int = 1,
    stages: tuple[tuple[int, ...], ...] = ((0, 1, 2),),
    virtual: int = 1,
    transformer_engine: bool = False,
    one_buffer: bool = False,
    args: Namespace | None = None,
    **state: Any,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of iteration 8 under ``root``; return its tensors, stacked over layers.

    ``stages`` are the layers of each part, in order, of which S pipeline stages hold ``virtual`` each: part i
    is in stage i % S. With ``one_buffer``, a rank's parameters lie in one storage, as with the distributed
    optimizer.
    """
    values = values or dense_checkpoint.tensors()
    args = args or dense_checkpoint.arguments()
    pipeline = len(stages) // virtual
    layout = {"tensor_model_parallel_size": tensor_parallel, "pipeline_model_parallel_size": pipeline}
    args = Namespace(**vars(args) | layout)
    for pp in range(pipeline):
        for tp in range(tensor_parallel):
            models = []
            for index in range(pp, len(stages), pipeline):
                model: dict[str, Any] = {}
                for key, value in values.items():
                    first = key.startswith("embedding.") and index == 0
                    last = key.startswith(("decoder.final", "output_layer.")) and index == len(stages) - 1
                    if first or last:
                        model[key] = shard(key, value, tp, tensor_parallel, args.swiglu)
                    for local, layer in enumerate(stages[index] if key.startswith(LAYERS) else ()):
                        name = f"{LAYERS}{local}.{key.removeprefix(LAYERS)}"
                        for fused, apart in () if transformer_engine else APART.items():
                            name = name.replace(fused, apart)
                        model[name] = shard(key, value[layer], tp, tensor_parallel, args.swiglu)
                        if name.endswith((".linear_qkv.weight", ".linear_fc1.weight", ".linear_fc2.weight")):
                            extra = torch.arange(9, dtype=torch.uint8) if transformer_engine else None
                            model[f"{name.removesuffix('weight')}_extra_state"] = extra
                models.append(in_one_buffer(model) if one_buffer else detached(model))
            names = ["model"] if virtual == 1 else [f"model{part}" for part in range(virtual)]
            folder = root / "iter_0000008" / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pipeline > 1 else ""))
            folder.mkdir(parents=True)
            content = {
                "args": args, "checkpoint_version": 3.0, "iteration": 8,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
                "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
            }  # fmt: skip
            torch.save(content | dict(zip(names, models, strict=True)) | state, folder / "model_optim_rng.pt")
            if one_buffer:
                torch.save({0: torch.ones(3)}, folder / "distrib_optim.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    return values


def detached(model: dict[str, Any]) -> dict[str, Any]:
    """Every tensor in a storage of its own, a norm as the ``Parameter`` that ``keep_vars`` keeps."""
    copies = {key: value if value is None else value.clone() for key, value in model.items()}
    norms = {key: torch.nn.Parameter(value) for key, value in copies.items() if "norm" in key}
    return copies | norms


def in_one_buffer(model: dict[str, Any]) -> dict[str, Any]:
    """Every parameter a view of one storage, the last first."""
    found = {k: v for k, v in reversed(model.items()) if v is not None and v.is_floating_point()}
    buffer = torch.cat([value.flatten() for value in found.values()])
    parts = buffer.split([value.numel() for value in found.values()])
    return model | {key: part.view(found[key].shape) for key, part in zip(found, parts, strict=True)}
