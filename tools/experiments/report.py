"""Write the report of a comparison: runs with mean and spread over seeds, claims, and each seed's loss."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from megatron_router_upcycling.files import versions
from tools.experiments import pictures
from tools.experiments.claims import Seen
from tools.experiments.comparison import Claim, Comparison
from tools.experiments.results import (
    CONFIDENCE,
    RunResult,
    answer_differences,
    crossings,
    differences,
    interval,
    training_differences,
)

# Routing measure -> its column's title and format.
COLUMNS = {
    "load_max_over_mean": ("busiest expert", ".2f"),
    "dead_experts": ("dead experts", ".1f"),
    "dropped_fraction": ("dropped", ".1%"),
    "weight_sum": ("weights' sum", ".2f"),
}
VERDICTS = (
    "claim: ends lower",
    "whose",
    "at this scale",
    "difference [95%]",
    "seeds lower",
    "for all claims at once",
)
NAMED = 3  # most crossings of two curves that are listed; more than these are noise


def spread(values: Sequence[float]) -> str:
    """Mean and, for more than one seed, sample standard deviation over seeds."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def verdict(
    claim: Claim, results: Sequence[RunResult], judged: int = 1, seen: Seen | None = None
) -> list[str]:
    """A row of ``VERDICTS`` for a claim; ``judged`` is the number of claims for the Bonferroni correction."""
    found = differences(results, claim.better, claim.than)
    word, difference, lower, of_all = "not judged", "", "", ""
    if len(found) > 1:
        apart = interval(found)
        difference, sure = str(apart), apart.excludes_zero
        word = "not shown" if not sure else "**shown**" if apart.mean < 0 else "**contradicted**"
        lower = f"{sum(d < 0 for d in found)} of {len(found)}"
        if sure and judged > 1:
            of_all = "yes" if interval(found, 1 - (1 - CONFIDENCE) / judged).excludes_zero else "no"
    mark = seen.describe(claim) if seen else ""
    return [f"{claim.better} < {claim.than}", claim.source, word + mark, difference, lower, of_all]


def crossing(results: Sequence[RunResult], name: str, reference: str) -> str:
    """Where a run's training loss crosses the reference's; "" if they have no seed in common."""
    tokens, found = training_differences(results, name, reference)
    if not tokens:
        return ""
    where = [f"{at / 1e6:.2f}" for at in crossings(tokens, found)]
    end = mean(found[-1])
    ends = f"ends {abs(end):.4f} {'below' if end < 0 else 'above'} it"
    if not where:
        return f"{name}: never crosses it and {ends}"
    if len(where) > NAMED:
        return f"{name}: crosses it {len(where)} times, last at {where[-1]} million tokens, and {ends}"
    return f"{name}: crosses it at {', '.join(where)} million tokens and {ends}"


def table(comparison: Comparison, results: Sequence[RunResult]) -> str:
    """The runs in the file's order, as Markdown."""
    header = ["run", "held-out loss", f"minus {comparison.reference} [95%]", "first training loss"]
    header += [title for title, _ in COLUMNS.values()]
    tasks = sorted({task for result in results for task in result.answers})
    for task in tasks:
        header += [f"{task} (%)", f"minus {comparison.reference} [95%]"]
    if comparison.paper:
        header.append(f"the paper's average score ({comparison.paper_table})")
    rows = [header]
    for name in comparison.runs:
        runs = [result for result in results if result.name == name]
        if not runs:
            continue
        against = differences(results, name, comparison.reference)
        first = [run.training[min(run.training)] for run in runs if run.training]
        count = f" ({len(runs)} of {len(comparison.seeds)} seeds)" * (len(runs) < len(comparison.seeds))
        row = [name, spread([run.held_out for run in runs]) + count]
        row.append("" if name == comparison.reference or not against else str(interval(against)))
        row.append(f"{mean(first):.4f}" if first else "")
        for key, (_, form) in COLUMNS.items():
            values = [run.routing[key] for run in runs if key in run.routing]
            row.append(f"{mean(values):{form}}" if values else "")
        for task in tasks:
            scores = [100 * mean(run.answers[task]) for run in runs if task in run.answers]
            row.append(f"{mean(scores):.1f}" if scores else "")
            better = answer_differences(results, task, name, comparison.reference)
            apart = interval([100 * value for value in better]) if better else None
            row.append(f"{apart:.1f}" if apart and name != comparison.reference else "")
        if comparison.paper:
            row.append(f"{comparison.paper[name]:.2f}" if name in comparison.paper else "")
        rows.append(row)
    return markdown(rows)


def by_seed(comparison: Comparison, results: Sequence[RunResult]) -> str:
    """The held-out loss of every run, as Markdown, from which the other figures can be recomputed."""
    found = {(result.name, result.seed): f"{result.held_out:.5f}" for result in results}
    names = [name for name in comparison.runs if any(name == other for other, _ in found)]
    header = ["run", *(f"seed {seed}" for seed in comparison.seeds)]
    rows = [[name, *(found.get((name, seed), "") for seed in comparison.seeds)] for name in names]
    return markdown([header, *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned to be readable as plain text; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write(
    comparison: Comparison,
    results: Sequence[RunResult],
    folder: Path,
    command: str,
    seen: Mapping[Claim, Seen] | None = None,
    failures: Sequence[str] = (),
    dense: float | None = None,
) -> str:
    """Write report.md, results.json and the plots to ``folder``; return the text of report.md.

    ``failures``: a sentence for each run that failed. ``dense``: the dense model's held-out loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.curves(comparison, results), folder / "loss_curves.png")
    pictures.save(pictures.differences_over_tokens(comparison, results), folder / "differences.png")
    seen = seen or {}
    judged = sum(len(differences(results, *claim.runs)) > 1 for claim in comparison.claims)
    verdicts = [verdict(claim, results, max(1, judged), seen.get(claim)) for claim in comparison.claims]
    others = [name for name in comparison.runs if name != comparison.reference]
    crossed = list(filter(None, (crossing(results, name, comparison.reference) for name in others)))
    about = f"Training loss beside that of {comparison.reference} (mean over the seeds that both have):"
    parts = [
        table(comparison, results),
        *(["Failed:", "\n".join(f"- {failure}" for failure in failures)] if failures else []),
        markdown([VERDICTS, *verdicts]) if verdicts else "",
        _notes(comparison, results, judged, sum(found.is_late for found in seen.values()), dense),
        about if crossed else "",
        "\n".join(f"- {sentence}" for sentence in crossed),
        "Held-out loss, seed by seed:",
        by_seed(comparison, results),
    ]
    text = "\n\n".join(filter(None, parts))
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    commits = sorted({result.commit for result in results})  # of this project, at which the runs began
    made += f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    (folder / "report.md").write_text(
        f"# {comparison.title}\n\nMade by `{command}` with {made}.\n\n"
        "![Differences over tokens](differences.png)\n\n"
        f"{text}\n\n![Loss curves](loss_curves.png)\n",
        encoding="utf-8",
    )
    found = {
        "title": comparison.title,
        "command": command,
        "versions": versions(),
        "runs": [asdict(result) for result in results],
        "verdicts": [dict(zip(VERDICTS, row, strict=True)) for row in verdicts],
        "claims": [asdict(claim) | {"seen": asdict(seen[claim])} for claim in seen],
        "failures": list(failures),
        "dense": dense,
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return text


def _notes(
    comparison: Comparison, results: Sequence[RunResult], judged: int, late: int, dense: float | None
) -> str:
    """A legend of the table's columns, and how claims are judged, as a Markdown list."""
    after = " or ".join(f"{tokens:,}" for tokens in sorted({result.tokens for result in results}))
    seeds, planned = ", ".join(map(str, comparison.seeds)), len(comparison.runs) * len(comparison.seeds)
    minutes = sum(result.seconds for result in results) / 60
    names = {result.name for result in results} - {comparison.reference}
    shown = sum(len(differences(results, name, comparison.reference)) > 1 for name in names)
    counts = {task: len(found) for result in results for task, found in result.answers.items()}
    notes = [
        f"Held-out loss: nats a token after {after} tokens, mean and standard deviation over seeds {seeds}."
        f" {len(results)} of {planned} runs have ended; training took {minutes:.0f} minutes in all.",
        dense is not None
        and f"The dense model that was upcycled has a held-out loss of {dense:.5f}, over batches drawn by its"
        " own seed; those of a run are drawn by the run's.",
        "Differences are taken seed by seed, and stand with their 95% interval (Student's t; two seeds or"
        " more), which reaches 2.5 standard deviations to each side with three seeds, and 9.0 with two.",
        "Busiest expert: its tokens over the mean. Like dead experts, dropped choices and the sum of a"
        " token's weights it is the mean over layers and seeds, at the end.",
        *(
            f"{task}: right answers to {count:,} questions, mean over seeds. The interval of its difference"
            " is over questions, each with its mean over seeds."
            for task, count in counts.items()
        ),
        comparison.claims
        and "A claim is shown or contradicted if the 95% interval leaves out 0; the last column says whether"
        " a wider interval does so too, which allows for the number of claims (Bonferroni)."
        f" {judged} of {len(comparison.claims)} claims could be judged; {late} were added when something"
        " of their runs was known, and are marked.",
        f"Comparisons made: {shown} intervals in the table and {judged} of claims; of 20 such intervals one"
        " is expected to miss.",
    ]
    return "\n".join(f"- {note}" for note in notes if note)
