"""The commands of a comparison: a few stages for each run, over those that make what all runs start from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.yaml_files import read_yaml
from tools.experiments.comparison import Comparison, run_name
from tools.experiments.foundation import (
    CORPUS,
    PACKAGE,
    QUICK_MODEL,
    QUICK_QUESTIONS,
    QUICK_RUN,
    Foundation,
    flags,
    num_ranks,
    program,
    torchrun,
)
from tools.experiments.stages import Stage, in_order


@dataclass(frozen=True)
class Plan:
    """The commands of a comparison; runs nothing."""

    comparison: Comparison
    quick: bool = False

    @property
    def output(self) -> Path:
        return self.comparison.output

    @property
    def foundation(self) -> Foundation | None:
        """Where the file has a dense model to train: the stages that make it and its key statistics."""
        config, corpus = self.comparison.dense, self.comparison.corpus or CORPUS
        return Foundation(self.output, config, self.quick, self.ranks, corpus) if config else None

    @property
    def ranks(self) -> int:
        """Processes of a run on this machine."""
        return self.comparison.ranks or num_ranks()

    def runs(self) -> Iterator[tuple[str, int]]:
        """Names and seeds, seed by seed, so that whole comparisons are there as early as can be."""
        return ((name, seed) for seed in self.comparison.seeds for name in self.comparison.runs)

    def stages(self) -> list[Stage]:
        return self.stages_of(self.runs())

    def stages_of(self, runs: Iterable[tuple[str, int]]) -> list[Stage]:
        """All that some of the runs need."""
        last = self.ask if self.comparison.tasks else self.train
        return in_order(last(*run) for run in runs)

    def convert(self, name: str, seed: int) -> Stage:
        config, run = self.comparison.runs[name], _folder_name(name, seed)
        dense, key_stats = self.comparison.checkpoint, self.comparison.key_stats
        after: tuple[Stage, ...] = ()
        if base := self.foundation:
            keys = base.keys(read_yaml(config)["upcycling"].get("key_source", "pre_rope"))
            dense, key_stats, after = base.dense.output, keys.output, (base.dense, keys)
        folder = self.output / "converted" / run
        options = flags(config=config, key_stats=key_stats, seed=seed, quiet=True)
        return Stage(
            f"convert-{run}",
            f"{name}, seed {seed}: convert",
            (program("router-upcycle"), "convert", str(dense), str(folder), *options),
            folder,
            (config,),
            after,
        )

    def train(self, name: str, seed: int) -> Stage:
        return self._pretrain("train", name, seed, "trained", resumes=True)

    def evaluate(self, name: str, seed: int) -> Stage:
        """The held-out loss before any training; no part of a comparison by itself."""
        return self._pretrain("evaluate", name, seed, "evaluated", skip_train=True)

    def export(self, name: str, seed: int) -> Stage:
        run = _folder_name(name, seed)
        title, folder = f"{name}, seed {seed}: export", self.output / "exported" / run
        return export(f"export-{run}", title, self.train(name, seed), folder, "--modelling-code")

    def ask(self, name: str, seed: int) -> Stage:
        """The tasks of ``evaluate``, asked of the trained model."""
        run, exported = _folder_name(name, seed), self.export(name, seed)
        folder = self.output / "asked" / run
        limit = QUICK_QUESTIONS if self.quick else None
        options = flags(tasks=self.comparison.tasks, limit=limit, batch_size=64, output=folder)
        options += flags(trust_remote_code=True)  # the folder is our own, of a moment ago
        return Stage(
            f"ask-{run}",
            f"{name}, seed {seed}: evaluate",
            (program("router-upcycle"), "evaluate", str(exported.output), *options),
            folder,
            after=(exported,),
        )

    def _pretrain(
        self, verb: str, name: str, seed: int, save: str, resumes: bool = False, **more: Any
    ) -> Stage:
        config, run = self.comparison.runs[name], _folder_name(name, seed)
        scratch, base = name in self.comparison.from_scratch, self.foundation
        converted = None if scratch else self.convert(name, seed)
        after = (converted,) if converted else (base.corpus,) if base else ()
        folder, launcher = self.output / save / run, self.comparison.launcher
        own = {"seed": seed, "load": converted and converted.output, "save": folder, **more}
        own |= QUICK_MODEL if scratch and self.quick else {}
        cache = {} if base else {"data_cache_path": self.output / "data_cache" / run}
        shortened = QUICK_RUN if base and self.quick else {}
        given = {flag: value for flag, value in self.comparison.flags.items() if flag not in shortened}
        # The methods' files spread the experts over two ranks.
        alone = {"expert_model_parallel_size": 1} if self.ranks == 1 and not launcher else {}
        command = (
            *((*launcher, "-m", f"{PACKAGE}pretrain") if launcher else torchrun("pretrain", self.ranks)),
            *flags(config=config),
            *(base.run_flags(run) if base else ()),
            *flags(**alone | cache | given | own),
        )
        title = f"{name}, seed {seed}: {verb}"
        return Stage(f"{verb}-{run}", title, command, folder, (config,), after, resumes)


def export(name: str, title: str, trained: Stage, folder: Path, *more: str) -> Stage:
    """Export what a stage trained to Hugging Face format."""
    options = (*flags(dtype="float32", quiet=True), *more)
    command = (program("router-upcycle"), "export-hf", str(trained.output), str(folder), *options)
    return Stage(name, title, command, folder, after=(trained,))


def _folder_name(name: str, seed: int) -> str:
    return f"{run_name(name)}-{seed}"
