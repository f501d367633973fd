"""What the demonstration found, from its logs: a table and a picture of the loss curves."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Megatron's lines, for example (two ranks may print on one line):
#  [2026-01-31 12:00:00.1] iteration       10/     280 | ... | lm loss: 7.525500E+00 | ...
#  validation loss at iteration 280 on validation set | lm loss value: 4.951234E+00 | lm loss PPL: ...
TRAINING = re.compile(r"\] iteration +(\d+)/ *\d+ \|.*?\| lm loss: (\S+) \|")
VALIDATION = re.compile(r"validation loss at iteration (\d+) on validation set \| lm loss value: (\S+) \|")

# Colour and width of a run's line: curves may lie on one another, so thinner ones are drawn on top.
STYLES = (("#444444", 2.0), ("#c8401e", 1.2), ("#2867b2", 3.0))


@dataclass
class Curve:
    """Losses of one run, in nats a token: in training by iteration, and on held-out text at the end."""

    training: dict[int, float] = field(default_factory=dict)
    held_out: float | None = None
    last: int = 0  # the iteration that the run ended with


@dataclass
class ModelResult:
    """One row of the table; None where a column does not apply (to the dense model)."""

    name: str
    loss_at_start: float | None  # held-out loss before any further training
    loss_at_end: float
    load_at_start: float | None  # tokens of the busiest expert over the mean, averaged over layers
    load_at_end: float | None
    conversion_seconds: float | None
    bytes_added: int | None  # by the conversion, to the disk
    bytes_named: int | None  # size of the converted checkpoint with what it shares counted in


def parse_log(text: str) -> Curve:
    """The losses in a log of Megatron; where a run was resumed, the later line of an iteration counts."""
    curve = Curve({int(iteration): float(loss) for iteration, loss in TRAINING.findall(text)})
    for iteration, loss in VALIDATION.findall(text):
        curve.last, curve.held_out = int(iteration), float(loss)
    curve.training = dict(sorted(curve.training.items()))  # a resumed run goes back to its last checkpoint
    return curve


def imbalance(tokens_per_expert: list[list[int]]) -> float:
    """Tokens of the busiest expert over the mean of all, averaged over layers: 1 is even, n is collapse.

    Args:
        tokens_per_expert: [layers][experts].
    """
    return sum(max(layer) * len(layer) / sum(layer) for layer in tokens_per_expert) / len(tokens_per_expert)


def disk_use(root: Path, source: Path) -> tuple[int, int]:
    """Bytes that checkpoint ``root`` adds beside ``source``, and the bytes of all its files.

    A file that is hard-linked to one of ``source`` adds nothing.
    """
    held = {(s.st_dev, s.st_ino) for s in (path.stat() for path in source.rglob("*") if path.is_file())}
    stats = [path.stat() for path in root.rglob("*") if path.is_file()]
    return (
        sum(s.st_size for s in stats if (s.st_dev, s.st_ino) not in held),
        sum(s.st_size for s in stats),
    )


LEGEND = (
    "Loss: nats a token on the same held-out samples. Load: tokens of the busiest expert over the mean,"
    " averaged over layers (1 is even). Conversion: wall time of the whole command. Bytes added: to the disk,"
    " of the size of the checkpoint's files."
)


def table(results: list[ModelResult]) -> str:
    """The results in Markdown that also reads well as plain text; LEGEND says what the columns are."""
    header = (
        "model",
        "loss at step 0",
        "at the end",
        "load at step 0",
        "at the end",
        "conversion",
        "bytes added",
    )
    rows = [
        (
            result.name,
            _number(result.loss_at_start, ".4f"),
            _number(result.loss_at_end, ".4f"),
            _number(result.load_at_start, ".2f"),
            _number(result.load_at_end, ".2f"),
            _number(result.conversion_seconds, ".1f", " s"),
            _number(
                result.bytes_added and result.bytes_added / 1e6,
                ".2f",
                f" of {(result.bytes_named or 0) / 1e6:.2f} MB",
            ),
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def exported(check: dict) -> str:
    """What tools.experiments.check_export found, as lines of Markdown."""
    lines = [
        f"Exported to Hugging Face format, router upcycling's held-out loss is {check['transformers']:.6f} in"
        f" transformers and {check['megatron']:.6f} in Megatron. It continues held-out text:",
        "",
    ]
    lines += [f"- {sample['prompt']!r} → {sample['continuation']!r}" for sample in check["samples"]]
    return "\n".join(lines)


def picture(dense: Curve, continued: dict[str, Curve], results: list[ModelResult], path: Path) -> None:
    """Draw the loss curves: the dense model, then each model that was made of it, on one time line.

    Args:
        dense: the dense model's run.
        continued: name -> run that starts where the dense one ended.
        results: their rows of the table; they have the losses at step 0 and at the end.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {result.name: result for result in results}
    converted_at = dense.last
    runs = [("dense", dense, 0), *((name, curve, converted_at) for name, curve in continued.items())]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    for axes in (left, right):
        for (name, curve, start), (colour, width) in zip(runs, STYLES, strict=True):
            style = {"color": colour, "zorder": 5 - width}
            steps = [start + step for step in curve.training]
            axes.plot(steps, list(curve.training.values()), linewidth=width, label=name, **style)
            ends = {start: rows[name].loss_at_start, start + curve.last: rows[name].loss_at_end}
            points = {step: loss for step, loss in ends.items() if loss is not None}
            axes.plot(
                list(points), list(points.values()), "o", ms=5 + 2 * width, markeredgecolor="white", **style
            )
        axes.axvline(converted_at, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("training step")
        axes.grid(alpha=0.25)
    left.set_ylabel("loss (nats a token)")
    left.set_title("line: training loss; points: held-out loss", fontsize=10)
    left.legend(frameon=False)
    shown = [loss for r in results for loss in (r.loss_at_start, r.loss_at_end) if loss is not None]
    shown += [loss for curve in continued.values() for loss in curve.training.values()]
    margin = 0.1 * (max(shown) - min(shown))
    right.set_xlim(converted_at * 0.9, (converted_at + max(c.last for c in continued.values())) * 1.02)
    right.set_ylim(min(shown) - margin, max(shown) + margin)
    right.set_title("from the conversion on", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def as_json(dense: Curve, continued: dict[str, Curve], results: list[ModelResult]) -> dict:
    """Everything that was measured, for other programs."""
    curves = {"dense": dense, **continued}
    return {
        "models": [asdict(result) for result in results],
        "curves": {name: asdict(curve) for name, curve in curves.items()},
    }
