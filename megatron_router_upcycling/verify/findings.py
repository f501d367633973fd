"""What verification finds, and how it is shown."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

ROWS_SHOWN = 30

# What is proved -> in words. The order is that of the table.
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
    """Something that is not as it must be. ``layer`` and ``expert`` are empty where there is none."""

    check: str  # a key of CHECKS
    name: str  # of a tensor, an object, a file or an argument
    what: str
    layer: str = ""
    expert: str = ""


class Findings:
    """Collects what is found, each thing once, and what was looked at."""

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
            lines += ["", *_columns([("differs", "layer", "expert", "how"), *map(_row, self._first())])]
            if (hidden := len(self.found) - ROWS_SHOWN) > 0:
                lines.append(f"and {hidden} more; --json FILE writes them all")
        return "\n".join(lines)

    def _first(self) -> list[Finding]:
        """Some of every check, so that many of one do not hide the others."""
        share = max(3, ROWS_SHOWN // len({finding.check for finding in self.found}))
        first = [finding for check in CHECKS for finding in self.of(check)[:share]]
        return first[:ROWS_SHOWN]

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


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return finding.name, finding.layer, finding.expert, finding.what


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def span(numbers: Iterable[int]) -> str:
    """``0-7`` or ``3`` or ``0,2,5``, for a table."""
    ordered = sorted(set(numbers))
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))
