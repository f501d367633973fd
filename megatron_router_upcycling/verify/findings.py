"""What is verified, what verification finds, and how that is shown."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.names import RELEASE
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.key_statistics.file import KeyStats

SHOWN = 10  # findings of each check in the table

# Check -> what it proves, in the order of the table.
CHECKS = {
    "metadata": "every element in exactly one chunk, every chunk in its file, nothing besides",
    "damage": "every chunk parses, has the shape and dtype claimed, matches its checksum",
    "finite": "no NaN and no infinity",
    "experts": "every expert bitwise equal to the dense FFN",
    "untouched": "everything else bitwise equal to the dense model's",
    "norms": "the norm before the FFN equal under both of its names",
    "routers": "routers equal to those computed again",
    "states": "extra states: the dense model's, or empty",
    "arguments": "training arguments and manifest agree with each other and with DENSE",
    "files": "files as the manifest records them",
}


@dataclass(frozen=True)
class Finding:
    """A difference from what must be. ``layer`` and ``expert`` are empty where they do not apply."""

    check: str  # a key of CHECKS
    name: str  # of a tensor, an object, a file or an argument
    what: str
    layer: str = ""
    expert: str = ""


class Findings:
    """Collects the findings, each once, and how much each check covered."""

    def __init__(self) -> None:
        self.found: dict[Finding, None] = {}
        self.looked_at: dict[str, str] = {}  # check -> how much of what, in words
        self.skipped: dict[str, str] = {}  # check -> why it was not made

    def add(self, check: str, name: str, what: str, layer: object = "", expert: object = "") -> None:
        assert check in CHECKS
        self.found[Finding(check, name, what, str(layer), str(expert))] = None

    def of(self, check: str) -> list[Finding]:
        return [finding for finding in self.found if finding.check == check]

    def __bool__(self) -> bool:
        return bool(self.found)

    def table(self) -> str:
        """What was proved and, below, what differs."""
        lines = []
        for check, words in CHECKS.items():
            count = len(self.of(check))
            verdict = f"{count} WRONG" if count else "not made" if check in self.skipped else "ok"
            more = self.skipped.get(check) or self.looked_at.get(check, "")
            lines.append(f"  {verdict:<9} {words}{f' ({more})' * bool(more)}")
        if self.found:
            rows = [("differs", "layer", "expert", "how")]
            for check in CHECKS:  # some of every check, so that many of one do not hide the others
                rows += [(one.name, one.layer, one.expert, one.what) for one in self.of(check)[:SHOWN]]
            *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
            lines.append("")
            lines += ["  " + "  ".join(map(str.ljust, row, (*widths, 0))) for row in rows]
            if hidden := len(self.found) + 1 - len(rows):
                lines.append(f"and {hidden} more; --json FILE writes them all")
        return "\n".join(lines)

    def to_json(self, **more: Any) -> str:
        checks = [
            {
                "check": check,
                "proves": words,
                "made": check not in self.skipped,
                "differences": len(self.of(check)),
                "looked_at": self.skipped.get(check) or self.looked_at.get(check, ""),
            }
            for check, words in CHECKS.items()
        ]
        found = [asdict(finding) for finding in self.found]
        return json.dumps(more | {"equal": not found, "checks": checks, "differences": found}, indent=2)


def span(numbers: Iterable[int]) -> str:
    """``0-7`` or ``3`` or ``0,2,5``, for a table."""
    ordered = sorted(set(numbers))
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))


@dataclass(frozen=True)
class Verification:
    """The Mixture-of-Experts, the conversion that must have made it, and the findings so far."""

    moe: Checkpoint
    record: dict[str, Any]  # the manifest
    plan: Plan  # of the dense checkpoint, with the options that the manifest records
    stats: KeyStats | None  # where some are needed
    findings: Findings

    @property
    def trained(self) -> bool:
        return self.moe.iteration_dir.name != RELEASE

    @property
    def bytes_to_read(self) -> int:
        """Bytes of values to read; bytes that several chunks share are read once."""
        return sum(
            sum({chunk.blob: math.prod(chunk.sizes) for chunk in stored.chunks}.values())
            * stored.dtype.itemsize
            for stored in self.moe.tensors.values()
        )

    def section(self, name: str) -> dict[str, Any]:
        return manifest.section(self.record, name, f"MOE {self.moe.root}: its manifest")

    def recorded_files(self, name: str) -> dict[str, dict[str, Any]]:
        """The entries of the manifest's section ``name``, by file."""
        files = self.section(name)
        for path, entry in files.items():
            if not isinstance(entry, dict) or Path(path).is_absolute() or ".." in Path(path).parts:
                raise UserError(
                    f"MOE {self.moe.root}: its manifest says {path!r} in {name!r}; convert the model again"
                )
        return files
