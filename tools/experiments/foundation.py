"""What the demonstration and every comparison stand on: a corpus, a dense model, its key statistics.

Stages for ``tools.stages.Pipeline``. Commands name programs and files relative to the folder that they are
run from, so that what is printed can be copied.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tools.experiments.stages import Stage

PACKAGE = "megatron_router_upcycling."
NUM_RANKS = 2
# What --quick changes: a model and a corpus just large enough to go through every step.
QUICK_CORPUS = ("--max-bytes", "800000", "--vocab-size", "500", "--held-out-fraction", "0.1")
QUICK_MODEL = ("--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "176", "--kv-channels", "8")
QUICK_RUN = ("--train-iters", "6", "--save-interval", "4", "--eval-iters", "2", "--log-interval", "2")


@cache
def program(name: str) -> str:
    """A program of this virtual environment, as a user would type it."""
    folder = Path(sys.executable).parent
    return str((folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder) / name)


def torchrun(module: str) -> tuple[str, ...]:
    """Run ``module`` on this machine's ranks."""
    return (program("torchrun"), "--standalone", "--nproc-per-node", str(NUM_RANKS), "-m", module)


@dataclass(frozen=True)
class Foundation:
    """The stages that come first, in ``output``."""

    output: Path
    dense_config: Path
    quick: bool = False

    @cached_property
    def corpus(self) -> Stage:
        folder = self.output / "corpus"
        options = QUICK_CORPUS if self.quick else ()
        command = (program("python"), "tools/experiments/corpus.py", "--output", str(folder))
        return Stage(
            "corpus",
            "prepare the corpus: a tokenizer, training and held-out documents",
            (*command, "--overwrite", "--quiet", *options),
            folder,
        )

    @cached_property
    def dense(self) -> Stage:
        return Stage(
            "dense",
            "train the dense model",
            (*torchrun(PACKAGE + "pretrain"), *self.dense_flags, "--save", str(self.output / "dense")),
            self.output / "dense",
            (self.dense_config,),
            (self.corpus,),
            resumes=True,
        )

    @property
    def run_flags(self) -> tuple[str, ...]:
        """Flags of every run: its length where it is a quick one, and the data."""
        corpus = self.output / "corpus"
        return (
            *(QUICK_RUN if self.quick else ()),
            *("--tokenizer-model", str(corpus / "tokenizer.model")),
            *("--data-cache-path", str(self.output / "data_cache")),
            *("--train-data-path", str(corpus / "train")),
            *("--valid-data-path", str(corpus / "held_out")),
        )

    @property
    def dense_flags(self) -> tuple[str, ...]:
        return ("--config", str(self.dense_config), *(QUICK_MODEL if self.quick else ()), *self.run_flags)

    def keys(self, source: str = "pre_rope") -> Stage:
        """Collect the dense model's key statistics, before or after the rotary embedding."""
        name = "key_stats" if source == "pre_rope" else f"key_stats_{source}"
        file = self.output / f"{name}.safetensors"
        flags = () if source == "pre_rope" else ("--key-source", source)
        return Stage(
            name,
            "collect the key statistics of the dense model" + (f", {source}" if flags else ""),
            (
                *(*torchrun(PACKAGE + "collect_keys"), *self.dense_flags, *flags),
                *("--load", str(self.dense.output), "--output", str(file), "--overwrite", "--quiet"),
            ),
            file,
            (self.dense_config,),
            (self.dense,),
        )


def environment() -> dict[str, str]:
    """The environment of the commands; hides a single GPU, on which two ranks cannot run."""
    changed = dict(os.environ, OMP_NUM_THREADS="1")
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        if 0 < listed.count("GPU ") < NUM_RANKS:
            print(f"One GPU is too few for {NUM_RANKS} ranks: this runs on the CPU.")
            changed["CUDA_VISIBLE_DEVICES"] = ""
    return changed
