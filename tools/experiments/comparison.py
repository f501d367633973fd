"""A comparison's YAML file: what is compared, and the claims that its report answers."""

import os
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.evaluation.runner import parse_tasks


@dataclass(frozen=True)
class Claim:
    """That run ``better`` ends with a lower held-out loss than ``than``; ``source`` says who claims it."""

    better: str
    than: str
    source: str

    @property
    def runs(self) -> tuple[str, str]:
        return self.better, self.than


@dataclass(frozen=True)
class Comparison:
    """What the file says.

    - ``from_scratch``: the runs that are trained without a conversion; their files have the architecture.
    - ``paper``: the paper's figure for a run, in percent, where it has one.
    - ``corpus``: flags of prepare-data, where the dense model is trained first.
    - ``ranks``: processes of a run on this machine, where no ``launcher`` starts it.
    - ``tasks``: of ``evaluate``, asked of every trained model, which is exported for that; "" for none.
    - ``output``: the folder to work in unless told otherwise. Runs that start from another dense model than
      those of another file, or have other flags, need one of their own.
    """

    path: Path
    title: str
    runs: dict[str, Path]
    seeds: tuple[int, ...]
    reference: str
    from_scratch: tuple[str, ...] = ()
    dense: Path | None = None
    corpus: dict[str, Any] = field(default_factory=dict)
    output: Path = Path("compare")
    ranks: int | None = None
    checkpoint: Path | None = None
    key_stats: Path | None = None
    launcher: tuple[str, ...] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    paper_table: str = ""
    tasks: str = ""
    claims: tuple[Claim, ...] = ()


def read(path: Path) -> Comparison:
    """Read and check a comparison's file; paths in it are relative to it.

    Raises:
        UserError: names the entry that cannot be.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(entries, dict) or not isinstance(entries.get("runs"), dict) or not entries["runs"]:
        raise UserError(f"{path}: needs 'runs:', a mapping of names to YAML files")
    known = [entry.name for entry in fields(Comparison) if entry.name != "path"]
    for name in entries:
        if name not in known:
            raise UserError(f"{path}: unknown entry {name!r}; known: {', '.join(known)}")

    def beside(name: Any) -> Path:
        return Path(os.path.normpath(path.parent / str(name)))

    def file(name: str) -> Path | None:
        return beside(entries[name]) if name in entries else None

    runs = {str(name): beside(config) for name, config in entries["runs"].items()}
    for config in runs.values():
        read_yaml(config)
    seeds = tuple(entries.get("seeds", (1234,)))
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: 'seeds:' must be a list of different whole numbers")
    if ("dense" in entries) == ("checkpoint" in entries):
        raise UserError(
            f"{path}: needs either 'dense:', the YAML of a model to train first, or 'checkpoint:'"
        )
    if "checkpoint" in entries and "key_stats" not in entries:
        raise UserError(f"{path}: 'checkpoint:' needs 'key_stats:' beside it")
    for name in ("flags", "corpus"):
        if not isinstance(entries.get(name, {}), dict):
            raise UserError(f"{path}: '{name}:' must be a mapping of names to values")
    if "corpus" in entries and "dense" not in entries:
        raise UserError(f"{path}: 'corpus:' is for a dense model that is trained first; leave it out")
    if "corpus" in entries and not {"train_tokenizer", "held_out"} <= entries["corpus"].keys():
        raise UserError(
            f"{path}: 'corpus:' needs 'train_tokenizer:' and 'held_out:', as prepare-data has them"
        )
    ranks = entries.get("ranks")
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        raise UserError(f"{path}: 'ranks:' must be a whole number of processes, as 1")
    tasks = str(entries.get("tasks", ""))
    try:
        parse_tasks(tasks or None)
    except UserError as error:
        raise UserError(f"{path}: 'tasks:' is evaluate's {error}") from None
    reference = entries.get("reference", next(iter(runs)))
    try:
        claims = tuple(Claim(**claim) for claim in entries.get("claims", ()))
    except TypeError:
        raise UserError(f"{path}: each of 'claims:' has 'better:', 'than:' and 'source:'") from None
    from_scratch = tuple(entries.get("from_scratch", ()))
    named = [reference, *from_scratch, *entries.get("paper", {})]
    named += [run for claim in claims for run in claim.runs]
    for name in named:
        if name not in runs:
            raise UserError(f"{path}: {name!r} is none of the runs ({', '.join(runs)})")
    return Comparison(
        path=path,
        title=entries.get("title", path.stem),
        runs=runs,
        seeds=seeds,
        reference=reference,
        from_scratch=from_scratch,
        dense=file("dense"),
        corpus=entries.get("corpus", {}),
        output=Path(str(entries.get("output", "compare"))),
        ranks=ranks,
        checkpoint=file("checkpoint"),
        key_stats=file("key_stats"),
        launcher=tuple(shlex.split(entries["launcher"])) if "launcher" in entries else None,
        flags=entries.get("flags", {}),
        paper=entries.get("paper", {}),
        paper_table=entries.get("paper_table", ""),
        tasks=tasks,
        claims=claims,
    )
