"""Every cluster configuration goes through the training entry's own parsing, as one rank of 64."""

import json
import re
import signal

import pytest

from tests import launch

CONFIGS = sorted(path.relative_to(launch.ROOT) for path in launch.ROOT.glob("configs/qwen*/*.yaml"))
# In one process, for the time that importing Megatron takes; the tokenizer's files are not here.
PARSE = """
import json, os, sys
from megatron.training.global_vars import unset_global_variables
from megatron_router_upcycling.layers import experts
from megatron_router_upcycling.training import device, launch
experts.usable = lambda device: None
os.chdir(sys.argv[1])
for config in sys.argv[2:]:
    flags = ["--config", config, "--mock-data", "--tokenizer-type", "NullTokenizer"]
    args = vars(launch.prepare(flags).args)
    request = launch.parse(flags)
    on_gpu = device.adapt(launch.merge(request, launch.find_origin(request, None), "cpu")[0], "cuda")
    print("parsed", json.dumps({"config": config, "on a GPU": on_gpu} | args, default=str))
    unset_global_variables()
"""


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict]:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "64"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    said = launch.python("-c", PARSE, launch.ROOT, *CONFIGS, **rank).ok().text
    lines = [line for line in said.splitlines() if line.startswith("parsed ")]
    return {args["config"]: args for args in (json.loads(line.removeprefix("parsed ")) for line in lines)}


def test_each_configuration_parses_and_stays_alive(parsed: dict[str, dict]) -> None:
    assert set(parsed) == set(map(str, CONFIGS)) and len(parsed) >= 7
    for config, args in parsed.items():
        checks = ("check_for_nan_in_loss_and_grad", "check_for_spiky_loss", "check_for_large_grads")
        assert all(args[name] for name in checks), config
        assert args["rerun_mode"] == "validate_results" and args["exit_signal_handler"], config
        assert args["exit_signal"] == signal.SIGURG, config
        assert args["global_batch_size"] * args["seq_length"] == 4_194_304, config


def test_which_runs_are_in_graphs_on_a_gpu_without_a_flag(parsed: dict[str, dict]) -> None:
    lines = {config.removeprefix("configs/"): args["on a GPU"] for config, args in parsed.items()}
    assert lines["qwen1.5-0.5b-8x/moe.yaml"].endswith(", cuda_graph_impl=local")
    parts = ", cuda_graph_impl=local, cuda_graph_modules=['attn', 'moe_router']"
    assert lines["qwen1.5-0.5b-8x/moe_ep8.yaml"].endswith(parts)
    for config, why in (
        ("qwen2.5-7b-4x/moe.yaml", "pipeline_model_parallel_size=2"),
        ("qwen1.5-0.5b-8x/dense.yaml", "num_experts=None"),
    ):
        assert lines[config].endswith(f"; no CUDA graphs, which are not known to work with {why}")


def test_the_papers_run(parsed: dict[str, dict]) -> None:
    """METHOD: section 4.1 of the paper."""
    args = parsed["configs/qwen1.5-0.5b-8x/moe.yaml"]
    stated = {
        "micro_batch_size": 4, "global_batch_size": 1024, "seq_length": 4096, "train_iters": 25_000,
        "lr": 5e-4, "lr_decay_style": "warmup-step-decay", "lr_warmup_fraction": 0.01, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "adam_eps": 1e-8, "clip_grad": 1.0, "weight_decay": 0.1,
        "moe_aux_loss_coeff": 0.02, "moe_z_loss_coeff": 0.001, "moe_router_dtype": "fp32",
        "num_experts": 8, "moe_router_topk": 2, "moe_router_pre_softmax": True,
        "expert_model_parallel_size": 1, "data_parallel_size": 64, "attention_dropout": 0.0,
        "moe_expert_capacity_factor": None,
    }  # fmt: skip
    assert {name: args[name] for name in stated} == stated
    spread = parsed["configs/qwen1.5-0.5b-8x/moe_ep8.yaml"]
    differs = {name for name in args if args[name] != spread[name]} - {"config", "on a GPU"}
    assert {name for name in differs if "expert" in name} == {"expert_model_parallel_size"}


@pytest.mark.parametrize("model", ["qwen2.5-7b-4x", "qwen3-8b-8x"])
def test_the_larger_models_layouts_rehearse(model: str) -> None:
    """One rank of 64 steps, at a narrow width, with all else as configured, recomputation included."""
    config = launch.ROOT / "configs" / model / "moe.yaml"
    narrow = "--hidden-size 64 --ffn-hidden-size 96 --kv-channels 4 --vocab-size 256 --padded-vocab-size 256"
    flags = ("--router", "mixture", "--rehearse", 64, "--rehearse-seq-length", 32, *narrow.split())
    said = launch.python("-m", "megatron_router_upcycling.pretrain", "--config", config, *flags).ok()
    assert "recompute_granularity=None, recompute_modules=None" in said.text  # both need Transformer Engine
    counts = re.findall(r"^  all +(\d+) +(\d+)$", said.text, flags=re.M)
    assert counts and counts[0][0] == counts[0][1]
