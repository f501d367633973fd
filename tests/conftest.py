"""What the tests share: token data, a small dense Qwen-shaped model trained a few steps, its keys, its MoE.

All of it is made by the package's own commands, once a session, however many processes share the tests.
"""

import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import launch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files at a time on two cores

VOCABULARY = 256
LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN = 4, 64, 8, 4, 8, 96

SIZES = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS}
GROUPED = {"group_query_attention": True, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM}
LAYER = {"add_qkv_bias": True, "disable_bias_linear": True, "normalization": "RMSNorm", "swiglu": True}
POSITIONS = {"position_embedding_type": "rope", "max_position_embeddings": 32}
EMBEDDING = {"untie_embeddings_and_output_weights": True, "make_vocab_size_divisible_by": 4}
MODEL = SIZES | GROUPED | LAYER | POSITIONS | EMBEDDING

BATCH = {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 8}
STEPS = {"train_iters": 8, "lr": 5e-3, "lr_decay_style": "constant", "save_interval": 4}
EVALUATION = {"eval_iters": 4, "eval_interval": 100, "log_interval": 1, "split": "90,10,0"}
DATA = {"tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY}
TRAINING = BATCH | STEPS | EVALUATION | DATA | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
EVALUATE = ("--skip-train", "--eval-iters", 4)

# They take longest, in this order: none of them should be what one process is left with at the end.
FIRST = ("pretend_gpu", "local", "slurm", "gpu_check", "methods", "training", "faults", "demo", "compare")
FIRST += ("expert_checkpoints", "fuzz", "megatron", "overlap", "resuming", "evaluate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.stem[5:]) in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the session shares, all processes of pytest-xdist included."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, if that is JSON, made by the first process that asks for ``path``."""
    record = path.with_name(f"{path.name}.made")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            record.write_text(json.dumps(make(), default=lambda _: None))
        return json.loads(record.read_text())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Megatron's process groups of one rank."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    """Prefix of a Megatron .bin/.idx pair: documents in which each token strongly suggests the next."""
    once(folder / "data", lambda: write_data(folder / "data"))
    return folder / "data"


def write_data(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    successor = generator.permutation(VOCABULARY)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(200):
        tokens = [int(generator.integers(VOCABULARY))]
        while len(tokens) < 129:
            surprise = generator.random() < 0.2
            tokens.append(int(generator.integers(VOCABULARY) if surprise else successor[tokens[-1]]))
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="session")
def dense_config(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """YAML of the dense model and its training; each process has its own, for the data cache beside it."""
    path = tmp_path_factory.mktemp("configs") / "dense.yaml"
    paths = {"data_path": [str(data)], "data_cache_path": str(path.with_name("cache"))}
    path.write_text(yaml.safe_dump(MODEL | TRAINING | paths))
    return path


@pytest.fixture(scope="session")
def moe_config(dense_config: Path) -> Path:
    """YAML that continues as a Mixture-of-Experts; the checkpoint brings the architecture."""
    path = dense_config.with_name("moe.yaml")
    losses = {"moe_aux_loss_coeff": 0.02, "moe_z_loss_coeff": 1e-3}
    kinds = {"moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall"}
    path.write_text(yaml.safe_dump({"base": dense_config.name, "moe_router_dtype": "fp32"} | losses | kinds))
    return path


@pytest.fixture(scope="session")
def dense(folder: Path, dense_config: Path) -> Path:
    """Root of a dense checkpoint after eight steps, float32, saved by one rank."""
    root = folder / "dense"
    once(root, lambda: launch.ranks(1, "pretrain", "--config", dense_config, "--save", root).ok())
    return root


@pytest.fixture(scope="session")
def dense_validation(folder: Path, dense: Path, dense_config: Path) -> float:
    """The dense model's validation loss, read back from its checkpoint."""

    def evaluate() -> float:
        output = launch.ranks(1, "pretrain", "--config", dense_config, "--load", dense, *EVALUATE).ok()
        assert "CPU over Gloo: set transformer_impl=local" in output.text
        return output.validation

    return once(folder / "dense_validation", evaluate)


@pytest.fixture(scope="session")
def key_stats_file(folder: Path, dense: Path, dense_config: Path) -> Path:
    path = folder / "key_stats.safetensors"
    flags = ("--config", dense_config, "--load", dense, "--output", path, "--collect-iters", 2)
    once(path, lambda: launch.torchrun(1, "collect_keys", *flags).ok())
    return path


@pytest.fixture(scope="session")
def moe(folder: Path, dense: Path, key_stats_file: Path) -> Path:
    """Root of the upcycled checkpoint: 8 routers, 8 experts, top 2; top-k then softmax."""
    root = folder / "moe"
    options = ("--num-experts", 8, "--top-k", 2, "--no-moe-router-pre-softmax")
    once(root, lambda: launch.cli("convert", dense, root, "--key-stats", key_stats_file, *options).ok())
    return root


def expert_parallel(config: Path, load: Path) -> tuple[object, ...]:
    """Flags of pretrain that continue ``load`` at EP 2."""
    parallel = ("--expert-model-parallel-size", 2, "--use-distributed-optimizer")
    return ("--config", config, "--load", load, *parallel)


@pytest.fixture(scope="session")
def unbroken(folder: Path, moe_config: Path, moe: Path) -> tuple[Path, dict[int, float]]:
    """A run of eight steps at EP 2 with the distributed optimizer, and its losses."""
    save = folder / "unbroken"

    def train() -> list[tuple[int, float]]:
        output = launch.torchrun(2, "pretrain", *expert_parallel(moe_config, moe), "--save", save).ok()
        assert "load_balancing_loss" in output.text and "z_loss" in output.text
        return list(output.losses.items())

    return save, dict(once(save, train))
