"""The stages that the demonstration and all comparisons share: a corpus, a dense model, its key statistics.

Commands name programs and files relative to the current folder, so that the printed commands can be copied.
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

NUM_RANKS = 2  # one on a machine with a single GPU
# What --quick changes: a model and a corpus just large enough to run every step.
CORPUS = {"source_library": True, "train_tokenizer": 4000, "held_out": 0.05}
QUICK_CORPUS = {"train_tokenizer": 500, "held_out": 0.1, "max_bytes": 800_000}
QUICK_MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 176, "kv_channels": 8}
QUICK_RUN = {"train_iters": 6, "save_interval": 4, "eval_iters": 2, "log_interval": 2}
# The demonstration's sizes, which override those of a comparison's file.
QUICK_RUN |= {"micro_batch_size": 8, "global_batch_size": 16}
QUICK_RUN |= {"seq_length": 256, "max_position_embeddings": 256}


def flags(**entries: Any) -> tuple[str, ...]:
    """Entries as flags: ``train_iters=80`` as ``--train-iters 80``, ``quiet=True`` as ``--quiet``.

    A list becomes a flag with several values; False and None leave the flag out.
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


def cli(*words: object, **options: Any) -> tuple[str, ...]:
    """A command of ``router-upcycle``."""
    return (program("router-upcycle"), *map(str, words), *flags(**options))


@cache
def gpus() -> list[str]:
    """The GPUs that commands will see here, as CUDA_VISIBLE_DEVICES names them."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    installed = [line for line in listed.splitlines() if line.startswith("GPU ")]
    every = ",".join(map(str, range(len(installed))))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    return [name for name in chosen if name][: len(installed)]


def num_ranks() -> int:
    """Two on the CPU or several GPUs; one on a single GPU, which two ranks cannot share."""
    return 1 if len(gpus()) == 1 else NUM_RANKS


def torchrun(module: str, ranks: int, launcher: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The command that runs a module of the package on ``ranks`` processes here, or with ``launcher``.

    One rank needs no torchrun, which takes seconds to start.
    """
    here: tuple[str, ...] = (program("python"),)
    if ranks > 1:
        here = (program("torchrun"), "--standalone", "--nproc-per-node", str(ranks))
    return (*(launcher or here), "-m", f"megatron_router_upcycling.{module}")


def environment() -> dict[str, str]:
    """The environment of the commands: one thread for each process, unless OMP_NUM_THREADS is set.

    The number must not depend on how many runs share the machine, because it changes the rounding of sums.
    """
    return {"OMP_NUM_THREADS": "1"} | os.environ


def shares(jobs: int, ranks: int) -> list[dict[str, str]]:
    """Additions to the environment of each of ``jobs`` parallel commands, which select its GPUs.

    If there are no more GPUs than a command has ranks, all commands share them.
    """
    found = gpus()
    if jobs == 1 or len(found) <= ranks:
        return [{} for _ in range(jobs)]
    turns = [[found[(job * ranks + rank) % len(found)] for rank in range(ranks)] for job in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(turn)} for turn in turns]


@dataclass(frozen=True)
class Foundation:
    """The first stages, in ``output``. ``corpus_flags``: flags of prepare-data that replace CORPUS."""

    output: Path
    dense_config: Path
    quick: bool
    ranks: int
    corpus_flags: dict[str, Any]

    @property
    def data(self) -> Path:
        """The prefix of the corpus; held-out data and tokenizer add suffixes to it."""
        return self.corpus.output / "text"

    @cached_property
    def corpus(self) -> Stage:
        folder = self.output / "corpus"
        given = (self.corpus_flags or CORPUS) | (QUICK_CORPUS if self.quick else {})
        command = cli("prepare-data", **given, output=folder / "text", overwrite=True, quiet=True)
        title = "prepare the corpus: a tokenizer, training and held-out documents"
        return Stage("corpus", title, command, folder, resumes=True)

    @cached_property
    def dense(self) -> Stage:
        folder, config = self.output / "dense", self.dense_config
        command = (*torchrun("pretrain", self.ranks), *self.dense_flags, *flags(save=folder))
        after = (self.corpus,)
        return Stage("dense", "train the dense model", command, folder, (config,), after, resumes=True)

    def run_flags(self, run: str) -> tuple[str, ...]:
        """Flags of every run: the data and, for a quick run, its length.

        ``run`` is its name: each run has its own cache of data indices, so that parallel runs do not collide.
        """
        data = flags(
            tokenizer_model=f"{self.data}.tokenizer.model",
            data_cache_path=self.output / "data_cache" / run,
            train_data_path=self.data,
            valid_data_path=f"{self.data}_held_out",
        )
        return (*flags(**(QUICK_RUN if self.quick else {})), *data)

    @property
    def dense_flags(self) -> tuple[str, ...]:
        model = flags(config=self.dense_config, **(QUICK_MODEL if self.quick else {}))
        return (*model, *self.run_flags("dense"))

    @property
    def keys(self) -> Stage:
        file = self.output / "key_stats.safetensors"
        options = flags(load=self.dense.output, output=file, overwrite=True, quiet=True)
        command = (*torchrun("collect_keys", self.ranks), *self.dense_flags, *options)
        title = "collect the key statistics of the dense model"
        return Stage("key_stats", title, command, file, (self.dense_config,), (self.dense,))
