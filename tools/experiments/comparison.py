"""Read a comparison's YAML file: the runs to compare, and the claims that its report checks."""

import os
import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.evaluation.runner import parse_tasks
from megatron_router_upcycling.files import write_whole


@dataclass(frozen=True)
class Claim:
    """The claim that run ``better`` ends with a lower held-out loss than run ``than``, made by ``source``."""

    better: str
    than: str
    source: str

    @property
    def runs(self) -> tuple[str, str]:
        return self.better, self.than


@dataclass(frozen=True)
class Comparison:
    """The content of the file.

    - ``runs``, ``dense``: YAML files; the dense model is trained first.
    - ``starts``: flags of convert, of runs whose entries have ``convert:``, with names in place of files.
      ``dense`` is a branch, or an earlier run: its trained model, with more experts or, if there is no other
      flag, as it is, trains on with the data that come next and a new optimizer. ``experts`` are branches;
      ``key_stats``, parts over which DENSE's are collected.
    - ``parts``: part of the text -> its folders and files in Python's library. The text is then all parts in
      equal shares. A branch is the dense model after further training on the part of its name, with
      ``branch_flags``; the branch ``all`` is trained on all parts, for as many steps as all others together.
    - ``from_scratch``: the runs that are trained without a conversion; their files have the architecture.
    - ``paper``: the paper's score for a run, in percent, if it has one.
    - ``corpus``: flags of prepare-data, if the dense model is trained first.
    - ``ranks``: number of processes of a run on this machine, if there is no ``launcher``.
    - ``tasks``: the tasks of ``evaluate`` for every trained model, which is exported for it; "" for none.
    - ``output``: the working folder. Comparison files with another dense model or other flags need separate
      folders.
    """

    path: Path
    title: str
    runs: dict[str, Path]
    seeds: tuple[int, ...]
    reference: str
    output: Path
    from_scratch: tuple[str, ...] = ()
    dense: Path | None = None
    corpus: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    branch_flags: dict[str, Any] = field(default_factory=dict)
    ranks: int | None = None
    checkpoint: Path | None = None
    key_stats: Path | None = None
    launcher: tuple[str, ...] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    paper_table: str = ""
    tasks: str = ""
    claims: tuple[Claim, ...] = ()


def read(path: Path, output: Path | None = None, quick: bool = False) -> Comparison:
    """Read and check a comparison's file; paths in it are relative to it.

    A run, or the dense model, is given as the name of a YAML file or as the entries of such a file, which are
    then written to ``OUTPUT/configs``.

    Args:
        output: the working folder (default: the file's; with ``quick``, its subfolder ``quick``).
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None

    _check(entries, path)
    tasks = str(entries.get("tasks") or "")
    try:
        parse_tasks(tasks or None)
        claims = tuple(Claim(**claim) for claim in entries.get("claims", ()))
    except UserError as error:
        raise UserError(f"{path}: 'tasks:' is evaluate's {error}") from None
    except TypeError:
        raise UserError(f"{path}: each of 'claims:' has 'better:', 'than:' and 'source:'") from None
    runs = {str(name): config for name, config in entries["runs"].items()}
    reference, from_scratch = entries.get("reference", next(iter(runs))), entries.get("from_scratch", ())
    named = [reference, *from_scratch, *entries.get("paper", {}), *(run for c in claims for run in c.runs)]
    for name in named:
        if name not in runs:
            raise UserError(f"{path}: {name!r} is none of the runs ({', '.join(runs)})")
    output = output or Path(str(entries.get("output", "compare"))) / ("quick" if quick else "")
    starts = {name: config["convert"] for name, config in runs.items() if "convert" in config}
    _check_starts(starts, list(runs), list(entries.get("parts", {})), path)

    def file(config: Any, name: str) -> Path:
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "convert"}
            return _write_config(config, path.parent, output / "configs" / f"{run_name(name)}.yaml")
        return Path(os.path.normpath(path.parent / str(config)))

    runs = {name: file(config, name) for name, config in runs.items()}
    for config in runs.values():
        read_yaml(config)
    given = entries.keys() & {"dense", "checkpoint", "key_stats"}
    paths = {name: file(entries[name], name) for name in given}
    worked_out = {
        "path": path,
        "title": entries.get("title", path.stem),
        "runs": runs,
        "starts": starts,
        "seeds": tuple(entries.get("seeds", (1234,))),
        "reference": reference,
        "output": output,
        "from_scratch": tuple(from_scratch),
        "launcher": tuple(shlex.split(entries["launcher"])) if "launcher" in entries else None,
        "tasks": tasks,
        "claims": claims,
    }
    return Comparison(**entries | paths | worked_out)


def _check(entries: Any, path: Path) -> None:
    def need(good: Any, what: str) -> None:
        if not good:
            raise UserError(f"{path}: {what}")

    runs = isinstance(entries, dict) and entries.get("runs")
    need(runs and isinstance(runs, dict), "needs 'runs:', a mapping of names to YAML files or their entries")
    known = [entry.name for entry in fields(Comparison) if entry.name not in ("path", "starts")]
    for name in entries:
        need(name in known, f"unknown entry {name!r}; known: {', '.join(known)}")
    seeds, ranks = entries.get("seeds", [1234]), entries.get("ranks", 1)
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)
    need(whole and len(set(seeds)) == len(seeds), "'seeds:' must be a list of different whole numbers")
    need(type(ranks) is int and ranks > 0, "'ranks:' must be a whole number of processes, as 1")
    one_start = ("dense" in entries) != ("checkpoint" in entries)
    need(one_start, "needs either 'dense:', the YAML of a model to train first, or 'checkpoint:'")
    need("dense" in entries or "key_stats" in entries, "'checkpoint:' needs 'key_stats:' beside it")
    for name in ("flags", "corpus", "parts", "branch_flags"):
        need(isinstance(entries.get(name, {}), dict), f"'{name}:' must be a mapping of names to values")
    lasts = "parts" not in entries or "train_iters" in entries.get("branch_flags", {})
    need(lasts, "'parts:' needs 'branch_flags:' with train_iters, the steps of a branch")
    for name in entries.keys() & {"corpus", "parts"}:
        need("dense" in entries, f"'{name}:' is for a dense model that is trained first; leave it out")
    if "corpus" in entries:
        prepared = {"train_tokenizer", "held_out"} <= entries["corpus"].keys()
        need(prepared, "'corpus:' needs 'train_tokenizer:' and 'held_out:', as prepare-data has them")


def _check_starts(starts: dict[str, dict[str, Any]], runs: list[str], parts: list[str], path: Path) -> None:
    """Refuse names that nothing has, and a run that would go on from itself or from a later one."""
    branches = [*parts, "all"] if parts else []
    for run, start in starts.items():
        among = {"dense": [*branches, *runs[: runs.index(run)]], "experts": branches, "key_stats": parts}
        for flag, known in among.items():
            named = start.get(flag, [])
            for name in named if isinstance(named, list) else [named]:
                if name not in known:
                    what = f"{flag} {name!r} of run {run!r} is none of {', '.join(known)}"
                    raise UserError(f"{path}: 'convert:' {what}")


def _write_config(entries: dict[str, Any], folder: Path, file: Path) -> Path:
    """Write a configuration's entries to ``file``. Their ``base:`` is relative to ``folder``."""
    base = entries.get("base", [])
    bases = [str((folder / name).resolve()) for name in ([base] if isinstance(base, str) else base)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(entries | {"base": bases}))
    return file


def run_name(name: str) -> str:
    """A run's name in the form used in file names."""
    return re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-")
