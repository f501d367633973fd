"""Record when each claim of a comparison was first seen, and which of its runs had begun by then.

Before anything runs, each claim that is not yet in ``OUTPUT/NAME/claims.json`` gets an entry there. Its key
is a digest of the claim and of everything that defines its two runs, so that swapping the sides of a claim
or changing a configuration makes it a new one. Runs that had begun are found by their records in OUTPUT, even
if they ran for another comparison file. If entries are lost, the claims are recorded again with what is known
then: an error makes a claim look later than it was, never earlier. Other folders are not considered.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import write_whole
from tools.experiments.comparison import Claim, Comparison, run_name

NAME = "claims.json"


@dataclass(frozen=True)
class Seen:
    """When a claim was first seen, as ``time`` (seconds since 1970), and how many trainings of each of its
    two runs had begun by then, with any seed."""

    time: float
    better_begun: int
    than_begun: int

    @property
    def is_late(self) -> bool:
        """Whether any training of its runs had begun."""
        return self.better_begun + self.than_begun > 0

    def describe(self, claim: Claim) -> str:
        """A mark for a late claim; "" for a claim that was made before its runs began."""
        if not self.is_late:
            return ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        begun = zip(claim.runs, (self.better_begun, self.than_begun), strict=True)
        known = " and ".join(f"{count or 'no'} run{'s' * (count != 1)} of {name}" for name, count in begun)
        both = self.better_begun and self.than_begun
        kind = "added after looking" if both else "added when one side was known"
        return f" ({kind}: first seen {when}, when {known} had begun)"


def see(comparison: Comparison) -> dict[Claim, Seen]:
    """When each claim of ``comparison`` was first seen; claims not seen before are recorded as of now."""
    file = comparison.output / comparison.path.stem / NAME
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        seen = {digest: Seen(**entry["seen"]) for digest, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: is damaged; without it the claims count as added now") from None
    digests = {claim: _digest(claim, comparison) for claim in comparison.claims}
    for claim, digest in digests.items():
        if digest not in seen:
            seen[digest] = Seen(time.time(), *(_begun(comparison, name) for name in claim.runs))
            entries[digest] = {"claim": asdict(claim), "seen": asdict(seen[digest])}
    if comparison.claims:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(entries, indent=1) + "\n")
    return {claim: seen[digest] for claim, digest in digests.items()}


def _digest(claim: Claim, comparison: Comparison) -> str:
    """A digest of the claim's two runs, their order, and everything that defines them."""
    dense = comparison.dense
    what = [*claim.runs, *(part for name in claim.runs for part in _defining(comparison, name))]
    start: Any = read_yaml(dense) if dense else [str(comparison.checkpoint), str(comparison.key_stats)]
    if comparison.parts:
        start = [start, comparison.parts, comparison.branch_flags]
    text = json.dumps([what, start, comparison.corpus, comparison.flags], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _defining(comparison: Comparison, name: str) -> list[Any]:
    """A run's entries and the start that its file gives it, and those of the run that it goes on from."""
    start, found = comparison.starts.get(name, {}), [read_yaml(comparison.runs[name])]
    if start:
        found.append(start)
    origin = start.get("dense")
    return found + (_defining(comparison, origin) if origin in comparison.runs else [])


def _begun(comparison: Comparison, name: str) -> int:
    """Number of trainings that began under the run's name, or with its configuration under another name,
    unless that is a run that begins elsewhere."""
    config, begun, starts = read_yaml(comparison.runs[name]), 0, comparison.starts
    apart = {f"train-{run_name(run)}" for run in comparison.runs if starts.get(run) != starts.get(name)}
    for path in (comparison.output / "stages").glob("train-*.json"):
        run = path.stem.rpartition("-")[0]
        files = (Path(word) for word in path.read_text(encoding="utf-8").split() if word.endswith(".yaml"))
        alike = run not in apart and any(file.is_file() and read_yaml(file) == config for file in files)
        begun += run == f"train-{run_name(name)}" or alike
    return begun
