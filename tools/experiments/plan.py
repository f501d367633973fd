"""The commands of a comparison: the shared stages (``foundation``), then a few stages for each run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.yaml_files import read_yaml
from tools.experiments.comparison import Comparison, run_name
from tools.experiments.foundation import QUICK_MODEL, QUICK_RUN, Foundation, cli, flags, num_ranks, torchrun
from tools.experiments.stages import Stage, in_order

QUICK_QUESTIONS = 20


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
        """The stages that make dense model and key statistics; None if the file names a checkpoint."""
        given = self.comparison
        more = (given.corpus, given.parts, given.branch_flags)
        return Foundation(self.output, given.dense, self.quick, self.ranks, *more) if given.dense else None

    @property
    def ranks(self) -> int:
        """Processes of a run on this machine."""
        return self.comparison.ranks or num_ranks()

    def runs(self) -> Iterator[tuple[str, int]]:
        """Names and seeds, ordered by seed, so that comparisons of all runs are complete early."""
        return ((name, seed) for seed in self.comparison.seeds for name in self.comparison.runs)

    def stages(self) -> list[Stage]:
        return self.stages_of(self.runs())

    def stages_of(self, runs: Iterable[tuple[str, int]]) -> list[Stage]:
        """All stages that ``runs`` need, in order."""
        last = self.ask if self.comparison.tasks else self.train
        return in_order(last(*run) for run in runs)

    def convert(self, name: str, seed: int) -> Stage:
        config, folder = self.comparison.runs[name], self._folder("converted", name, seed)
        own = self.comparison.starts.get(name, {}) | {"seed": seed, "quiet": True}
        branch, experts, parts = (own.pop(flag, None) for flag in ("dense", "experts", "key_stats"))
        if origin := self._origin(name):
            trained = self.train(origin, seed)
            command = cli("convert", trained.output, folder, **own)
            return self._stage("convert", name, seed, command, folder, after=(trained,))
        dense, keys = self.comparison.checkpoint, [self.comparison.key_stats]
        after: tuple[Stage, ...] = ()
        if base := self.foundation:
            model, sources = base.branch(branch), [base.branch(name) for name in experts or ()]
            stats = [base.keys(branch, part) for part in parts or (None,)]
            dense, keys = model.output, [stage.output for stage in stats]
            own |= {"experts": [stage.output for stage in sources]} if sources else {}
            after = (model, *stats, *sources)
        command = cli("convert", dense, folder, config=config, key_stats=keys, **own)
        return self._stage("convert", name, seed, command, folder, (config,), after)

    def _origin(self, name: str) -> str | None:
        """The run whose trained model a run goes on from."""
        origin = self.comparison.starts.get(name, {}).get("dense")
        return origin if origin in self.comparison.runs else None

    def _steps(self, name: str) -> int:
        """Training steps up to the end of a run, those of the runs before it included."""
        given = read_yaml(self.comparison.runs[name]) | self.comparison.flags
        steps = (given | (QUICK_RUN if self.quick else {}))["train_iters"]
        return steps + (self._steps(origin) if (origin := self._origin(name)) else 0)

    def train(self, name: str, seed: int) -> Stage:
        return self._pretrain("train", name, seed, "trained")

    def evaluate(self, name: str, seed: int) -> Stage:
        """The held-out loss before any training, which only the demonstration uses."""
        return self._pretrain("evaluate", name, seed, "evaluated", skip_train=True)

    def export(self, name: str, seed: int) -> Stage:
        trained, folder = self.train(name, seed), self._folder("exported", name, seed)
        command = export_command(trained, folder, modelling_code=True)
        return self._stage("export", name, seed, command, folder, after=(trained,))

    def ask(self, name: str, seed: int) -> Stage:
        """Evaluate the trained model on the tasks of ``evaluate``."""
        exported, folder = self.export(name, seed), self._folder("asked", name, seed)
        limit = QUICK_QUESTIONS if self.quick else None
        options = {"tasks": self.comparison.tasks, "limit": limit, "batch_size": 64, "output": folder}
        # Safe to trust: the export stage has just written this folder.
        command = cli("evaluate", exported.output, **options, trust_remote_code=True)
        return self._stage("ask", name, seed, command, folder, after=(exported,))

    def _pretrain(self, verb: str, name: str, seed: int, done: str, skip_train: bool = False) -> Stage:
        config, folder = self.comparison.runs[name], self._folder(done, name, seed)
        scratch, base = name in self.comparison.from_scratch, self.foundation
        launcher = self.comparison.launcher
        origin = self._origin(name)
        as_it_is = origin if self.comparison.starts.get(name) == {"dense": origin} else None
        before = self.train(as_it_is, seed) if as_it_is else None if scratch else self.convert(name, seed)
        after = (before,) if before else base.texts if base else ()
        load = "pretrained_checkpoint" if as_it_is else "load"
        own: dict[str, Any] = {"seed": seed, load: before and before.output, "save": folder}
        own |= {"skip_train": skip_train}
        own |= QUICK_MODEL if scratch and self.quick else {}
        if origin:  # its data go on after those of the run before
            seen = list(range(1, self._steps(origin) + 1))
            own |= {"train_iters": self._steps(name), "iterations_to_skip": seen}
        cache = {} if base else {"data_cache_path": self.output / "data_cache" / folder.name}
        shortened = QUICK_RUN if base and self.quick else {}
        given = {flag: value for flag, value in self.comparison.flags.items() if flag not in shortened}
        # The methods' files set expert parallelism over two ranks.
        alone = {"expert_model_parallel_size": 1} if self.ranks == 1 and not launcher else {}
        command = (
            *torchrun("pretrain", self.ranks, launcher),
            *flags(config=config),
            *(base.run_flags(folder.name) if base else ()),
            *flags(**alone | cache | given | own),
        )
        return self._stage(verb, name, seed, command, folder, (config,), after, resumes=not skip_train)

    def _folder(self, done: str, name: str, seed: int) -> Path:
        return self.output / done / f"{run_name(name)}-{seed}"

    def _stage(self, verb: str, name: str, seed: int, *rest: Any, **options: Any) -> Stage:
        return Stage(f"{verb}-{run_name(name)}-{seed}", f"{name}, seed {seed}: {verb}", *rest, **options)


def export_command(trained: Stage, folder: Path, **options: Any) -> tuple[str, ...]:
    """The command that exports the model of the stage ``trained`` to Hugging Face format."""
    return cli("export-hf", trained.output, folder, dtype="float32", quiet=True, **options)
