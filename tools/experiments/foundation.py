"""The stages that the demonstration and all comparisons share: a corpus, a dense model, its key statistics.

Commands name programs and files relative to the current folder, so that the printed commands can be copied.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tools.experiments.stages import Stage

NUM_RANKS = 2  # one on a machine with a single GPU
# What --quick changes: a model and a corpus just large enough to run every step.
CORPUS = {"source_library": True, "train_tokenizer": 4000, "held_out": 0.05}
BRANCH_SEED = 4321  # another order of the data than that of the dense model and of any run
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
    """The first stages, in ``output``. ``corpus_flags``: flags of prepare-data that replace CORPUS.
    ``parts`` and ``branch_flags`` are a comparison's."""

    output: Path
    dense_config: Path
    quick: bool
    ranks: int
    corpus_flags: dict[str, Any]
    parts: dict[str, list[str]] = field(default_factory=dict)
    branch_flags: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The prefix of the corpus; held-out data and tokenizer add suffixes to it."""
        return self.corpus.output / "text"

    def _blend(self, part: str | None = None, suffix: str = "") -> list[str]:
        """The data of one part, or all, as Megatron's flags name them."""
        if not self.parts:
            return [f"{self.data}{suffix}"]
        prefixes = [self.part(name).output / f"text{suffix}" for name in ([part] if part else self.parts)]
        return [word for prefix in prefixes for word in ("1", str(prefix))]

    @cached_property
    def texts(self) -> tuple[Stage, ...]:
        """The stages that make all data."""
        return (self.corpus, *map(self.part, self.parts))

    def part(self, name: str) -> Stage:
        """The text of a part. Which documents are held out depends on their text alone."""
        folder, library = self.output / f"corpus_{name}", Path(sysconfig.get_path("stdlib"))
        places = [library / place for place in self.parts[name]]
        options = {"tokenizer": f"{self.data}.tokenizer.model", "output": folder / "text"}
        held_out = (self.corpus_flags or CORPUS)["held_out"]
        command = cli("prepare-data", *places, **options, held_out=held_out, overwrite=True, quiet=True)
        return Stage(f"corpus_{name}", f"prepare the part {name}", command, folder, after=(self.corpus,))

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
        command = (*torchrun("pretrain", self.ranks), *self._dense_flags("dense"), *flags(save=folder))
        return Stage("dense", "train the dense model", command, folder, (config,), self.texts, resumes=True)

    def branch(self, name: str | None) -> Stage:
        """A branch of the dense model, or that model itself."""
        if name is None:
            return self.dense
        part, times = (None, len(self.parts)) if name == "all" else (name, 1)
        own = self.branch_flags | (QUICK_RUN if self.quick else {})
        own |= {"train_iters": times * own["train_iters"], "seed": BRANCH_SEED}
        folder, config = self.output / f"dense_{name}", self.dense_config
        own |= {"pretrained_checkpoint": self.dense.output, "save": folder}
        command = (*torchrun("pretrain", self.ranks), *self._dense_flags(folder.name, part), *flags(**own))
        title, after = f"train the branch {name}", (self.dense,)
        return Stage(folder.name, title, command, folder, (config,), after, resumes=True)

    def run_flags(self, run: str, part: str | None = None) -> tuple[str, ...]:
        """Flags of every run: the data and, for a quick run, its length.

        ``run`` is its name: each run has its own cache of data indices, so that parallel runs do not collide.
        """
        data = flags(
            tokenizer_model=f"{self.data}.tokenizer.model",
            data_cache_path=self.output / "data_cache" / run,
            train_data_path=self._blend(part),
            valid_data_path=self._blend(part, "_held_out"),
        )
        return (*flags(**(QUICK_RUN if self.quick else {})), *data)

    def _dense_flags(self, run: str, part: str | None = None) -> tuple[str, ...]:
        model = flags(config=self.dense_config, **(QUICK_MODEL if self.quick else {}))
        return (*model, *self.run_flags(run, part))

    def keys(self, branch: str | None = None, part: str | None = None) -> Stage:
        """The key statistics of the dense model or of a branch, over all text or a part."""
        model = self.branch(branch)
        name = "_".join(filter(None, ("key_stats", branch, part and f"over_{part}")))
        file = self.output / f"{name}.safetensors"
        options = flags(load=model.output, output=file, overwrite=True, quiet=True)
        command = (*torchrun("collect_keys", self.ranks), *self._dense_flags(name, part), *options)
        title = f"collect the key statistics of {f'branch {branch}' if branch else 'the dense model'}"
        title += f" over {part}" if part else ""
        return Stage(name, title, command, file, (self.dense_config,), (model,))
