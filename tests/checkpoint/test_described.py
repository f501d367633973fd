"""Dense checkpoints of other tools: what describes the model, and what must agree with it."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint.dense_model import BUILD_DEFAULTS, MODEL_DEFAULTS
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from tests import dense_checkpoint as dense
from tests import hf_models, launch

ARGUMENTS = vars(dense.arguments())
SAME = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
SAME += ("kv_channels", "add_bias_linear", "add_qkv_bias", "normalization", "layernorm_epsilon")
RUN_CONFIG = {name: ARGUMENTS[name] for name in (*SAME, "position_embedding_type")} | {
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "share_embeddings_and_output_weights": False,
    "vocab_size": dense.VOCABULARY,
    "seq_length": 16,
}
CONFIG_JSON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": dense.LAYERS,
    "hidden_size": dense.HIDDEN,
    "intermediate_size": dense.FFN,
    "num_attention_heads": dense.HEADS,
    "num_key_value_heads": dense.GROUPS,
    "vocab_size": dense.VOCABULARY,
    "max_position_embeddings": 16,
}
OTHERS = Namespace(model="Qwen", torch_dtype="bfloat16", tensor_model_parallel_size=1)
MODEL_YAML = {
    name: value
    for name, value in vars(dense.arguments()).items()
    if name.startswith(("num_", "hidden", "ffn", "kv", "swiglu", "add_qkv", "norm", "untie", "group"))
} | {"norm_epsilon": "1e-6", "disable_bias_linear": True, "position_embedding_type": "rope"}


def describe(root: Path, source: str, **changes: object) -> list[str]:
    """Write what ``source`` describes the checkpoint with; flags of convert."""
    folder = root / "iter_0000008"
    match source:
        case "run_config.yaml":
            (folder / source).write_text(yaml.safe_dump({"model": RUN_CONFIG | changes}))
        case "config.json":
            (root / source).write_text(json.dumps(CONFIG_JSON | changes))
        case "model.yaml":
            (root / source).write_text(yaml.safe_dump(MODEL_YAML | changes))
            return ["--config", str(root / source)]
    return []


@pytest.mark.parametrize(
    ("source", "setting"),
    [("run_config.yaml", "hidden_size"), ("config.json", "num_hidden_layers"), ("model.yaml", "hidden_size")],
)
def test_a_model_that_other_files_describe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, setting: str
) -> None:
    root, moe = tmp_path / "dense", tmp_path / "moe"
    dense.write(root, args=OTHERS)
    convert = ["convert", str(root), str(moe), "--router", "linear", "--quiet"]
    assert cli.main(convert) == 2
    assert "describe the model with --config model.yaml" in capsys.readouterr().err
    for value, words in ((40, ("40", "80")), ("abc", ("abc",))):
        flags = describe(root, source, **{setting: value})
        assert cli.main(convert + flags) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and source in said and any(word in said for word in words)
    flags = describe(root, source)
    assert cli.main(["inspect", str(root), *flags]) == 0
    said = capsys.readouterr().out
    assert source in said and "hidden_size 32" in said and "None" not in said
    assert cli.main(convert + flags) == 0
    assert cli.main(["verify", str(root), str(moe), "--quiet", *flags]) == 0
    args, expected = open_checkpoint(moe).args, dense.arguments()
    assert args.num_experts == 8 and not hasattr(args, "model")
    for name in ("num_layers", "num_query_groups", "add_qkv_bias", "layernorm_epsilon", "normalization"):
        assert getattr(args, name) == getattr(expected, name), name


def test_the_tensors_say_what_a_checkpoint_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {key: value for key, value in dense.tensors().items() if not dense.is_ffn(key)}
    values[f"{dense.MLP}.router.weight"] = torch.ones(dense.LAYERS, 6, dense.HIDDEN)
    dense.write(tmp_path / "moe", values, args=OTHERS, extra_states=False)
    assert cli.main(["inspect", str(tmp_path / "moe")]) == 0
    said = capsys.readouterr().out
    assert "Mixture-of-Experts, 6 experts, no router_upcycling.json" in said and "None" not in said


def test_megatron_builds_its_configuration_from_what_is_written(tmp_path: Path) -> None:
    """Each argument that it asks for is there, with Megatron's own default. (In a process of its own: the
    bridge to the CPU stays installed.)"""
    code = f"from tests.checkpoint import test_described; test_described.build({str(tmp_path)!r})"
    launch.python("-c", code).ok()


def build(folder: str) -> None:
    tmp_path = Path(folder)
    from argparse import ArgumentParser

    from megatron_router_upcycling.training.patches import cpu_backend

    cpu_backend.install()
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
    from megatron.training.arguments import add_megatron_arguments

    defaults = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args([])
    for name, value in (MODEL_DEFAULTS | BUILD_DEFAULTS).items():
        assert getattr(defaults, name) == value or (value is None and not getattr(defaults, name)), name
    source = hf_models.make("qwen3", tmp_path / "hf")
    assert cli.main(["import-hf", str(source), str(tmp_path / "dense"), "--quiet"]) == 0
    command = ["convert", str(tmp_path / "dense"), str(tmp_path / "moe"), "--router", "linear", "--quiet"]
    assert cli.main(command) == 0
    for name, experts in (("dense", None), ("moe", 8)):
        args = open_checkpoint(tmp_path / name).args
        config = core_transformer_config_from_args(args)
        assert (config.num_layers, config.kv_channels, config.num_moe_experts) == (2, 16, experts)
        assert gpt_config_from_args(args).rotary_base == 5000000
