"""What the demonstration and every comparison stand on: a corpus, a dense model, its key statistics.

Commands name programs and files relative to the folder that they are run from, so that what is printed can
be copied.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tools.experiments.stages import Stage

PACKAGE = "megatron_router_upcycling."
NUM_RANKS = 2  # but one on a machine with a single GPU
# What --quick changes: a model and a corpus just large enough to go through every step.
CORPUS = {"train_tokenizer": 4000, "held_out": 0.05}
QUICK_CORPUS = {"train_tokenizer": 500, "held_out": 0.1, "max_bytes": 800_000}
QUICK_MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 176, "kv_channels": 8}
QUICK_RUN = {"train_iters": 6, "save_interval": 4, "eval_iters": 2, "log_interval": 2}


def flags(**entries: Any) -> tuple[str, ...]:
    """Entries as flags: ``train_iters=80`` as ``--train-iters 80``, ``quiet=True`` as ``--quiet``.

    A list gives its flag several words; False and None give none at all.
    """
    words: list[str] = []
    for name, value in entries.items():
        if value is False or value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return tuple(words)


@cache
def program(name: str) -> str:
    """A program of this virtual environment, as a user would type it."""
    folder = Path(sys.executable).parent
    return str((folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder) / name)


@cache
def num_gpus() -> int:
    """GPUs that commands will see here."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    installed = sum(line.startswith("GPU ") for line in listed.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return installed if chosen is None else min(installed, len([name for name in chosen.split(",") if name]))


def num_ranks() -> int:
    """Two, on two GPUs or the CPU; one where there is a single GPU, which two cannot share."""
    return 1 if num_gpus() == 1 else NUM_RANKS


def torchrun(module: str) -> tuple[str, ...]:
    """Run ``module`` on this machine's ranks."""
    return (program("torchrun"), "--standalone", "--nproc-per-node", str(num_ranks()), "-m", module)


def on_these_ranks() -> tuple[str, ...]:
    """What a model with experts needs beside its file, which spreads them over two ranks."""
    return flags(expert_model_parallel_size=1) if num_ranks() == 1 else ()


@dataclass(frozen=True)
class Foundation:
    """The stages that come first, in ``output``."""

    output: Path
    dense_config: Path
    quick: bool = False

    @property
    def data(self) -> Path:
        """The prefix of the corpus; what is held out and the tokenizer have endings of their own."""
        return self.corpus.output / "text"

    @cached_property
    def corpus(self) -> Stage:
        folder = self.output / "corpus"
        options = flags(
            source_library=True,
            output=folder / "text",
            overwrite=True,
            quiet=True,
            **(QUICK_CORPUS if self.quick else CORPUS),
        )
        return Stage(
            "corpus",
            "prepare the corpus: a tokenizer, training and held-out documents",
            (program("router-upcycle"), "prepare-data", *options),
            folder,
            resumes=True,
        )

    @cached_property
    def dense(self) -> Stage:
        folder = self.output / "dense"
        return Stage(
            "dense",
            "train the dense model",
            (*torchrun(PACKAGE + "pretrain"), *self.dense_flags, *flags(save=folder)),
            folder,
            (self.dense_config,),
            (self.corpus,),
            resumes=True,
        )

    @property
    def run_flags(self) -> tuple[str, ...]:
        """Flags of every run: its length where it is a quick one, and the data."""
        data = flags(
            tokenizer_model=f"{self.data}.tokenizer.model",
            data_cache_path=self.output / "data_cache",
            train_data_path=self.data,
            valid_data_path=f"{self.data}_held_out",
        )
        return (*flags(**(QUICK_RUN if self.quick else {})), *data)

    @property
    def dense_flags(self) -> tuple[str, ...]:
        return (*flags(config=self.dense_config, **(QUICK_MODEL if self.quick else {})), *self.run_flags)

    def keys(self, source: str = "pre_rope") -> Stage:
        """Collect the dense model's key statistics, before or after the rotary embedding."""
        is_default = source == "pre_rope"
        name = "key_stats" if is_default else f"key_stats_{source}"
        file = self.output / f"{name}.safetensors"
        options = flags(
            key_source=None if is_default else source,
            load=self.dense.output,
            output=file,
            overwrite=True,
            quiet=True,
        )
        return Stage(
            name,
            "collect the key statistics of the dense model" + ("" if is_default else f", {source}"),
            (*torchrun(PACKAGE + "collect_keys"), *self.dense_flags, *options),
            file,
            (self.dense_config,),
            (self.dense,),
        )


def environment() -> dict[str, str]:
    """The environment of the commands."""
    return dict(os.environ, OMP_NUM_THREADS="1")
