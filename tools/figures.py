"""Draw README's two figures: docs/method.png (heads into routers) and docs/data_flow.png (the commands).

.venv/bin/python -m tools.figures
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")  # one a group of heads
GREY, INK = "#eef0f3", "#222222"


def canvas(width: float, height: float) -> Axes:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def box(
    axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = GREY, fontsize: float = 10
) -> None:
    """A box whose lower left corner is at (x, y)."""
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", fc=colour, ec=INK, lw=0.8)
    axes.add_patch(shape)
    ink = INK if colour == GREY else "white"
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=ink, fontsize=fontsize)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08, text, ha="center", fontsize=9)


def title(axes: Axes, x: float, head: str, *below: str) -> None:
    axes.text(x, 4.0, head, ha="center", fontsize=11, fontweight="bold", color=INK)
    axes.text(x, 3.74, "\n".join(below), ha="center", va="top", fontsize=9, color=INK, linespacing=1.35)


def method() -> None:
    """Draw how a layer's eight heads become four groups, four routers with four keys, and one gate."""
    axes = canvas(11, 4.3)
    groups = [(0, 5), (1, 3), (2, 7), (4, 6)]
    group_of = {head: number for number, pair in enumerate(groups) for head in pair}
    top, step = 2.75, 0.36
    for head in range(8):
        y = top - head * step
        box(axes, 0.3, y, 1.3, 0.28, f"head {head + 1}", COLOURS[group_of[head]], fontsize=9)
        arrow(axes, (1.65, y + 0.14), (2.75, 2.52 - group_of[head] * 0.7 + 0.2))
    for number, (first, second) in enumerate(groups):
        y, colour = 2.52 - number * 0.7, COLOURS[number]
        box(axes, 2.8, y, 1.5, 0.42, f"heads {first + 1} and {second + 1}", colour, fontsize=9)
        arrow(axes, (4.35, y + 0.21), (5.05, y + 0.21))
        box(axes, 5.1, y, 1.2, 0.42, f"router $W_{number + 1}$", colour, fontsize=9)
        box(axes, 6.45, y, 1.2, 0.42, f"key $K_{number + 1}$", colour, fontsize=9)
        arrow(axes, (7.7, y + 0.21), (8.45, 1.65 + (1.5 - number) * 0.22))
    box(axes, 8.5, 1.1, 2.2, 1.1, "one gate\n$A = K\\,(W_1+\\dots+W_4)\\,/\\sqrt{d'}$", fontsize=9.5)
    title(axes, 0.95, "1  attention heads", "of the dense layer, with the", "mean key of each over some text")
    title(axes, 3.55, "2  groups", "heads whose keys", "are most alike")
    joined = "its keys, joined: the key of one expert"
    title(axes, 6.38, "3  routers and keys", "a group's query projections, stacked;", joined)
    computed = "as the gate of any Mixture-of-Experts"
    title(axes, 9.6, "4  a linear gate", "trained as routers and keys, computed", computed)
    save("method")


def data_flow() -> None:
    """Draw the commands and their outputs."""
    axes = canvas(11, 3.5)
    y, low, h = 2.2, 0.55, 0.7
    blue, orange, green = COLOURS[:3]
    box(axes, 0.1, y, 1.6, h, "Hugging Face\nQwen folder", blue)
    arrow(axes, (1.75, y + 0.35), (3.15, y + 0.35), "import-hf")
    box(axes, 3.2, y, 1.7, h, "dense Megatron\ncheckpoint")
    arrow(axes, (4.95, y + 0.35), (6.55, y + 0.35), "convert, verify")
    box(axes, 6.6, y, 1.7, h, "Mixture-of-Experts\nto train", orange)
    arrow(axes, (8.35, y + 0.35), (9.25, y + 0.35), "pretrain")
    box(axes, 9.3, y, 1.6, h, "trained\nMixture-of-Experts", orange)
    box(axes, 0.1, low, 1.6, h, "text", blue)
    arrow(axes, (1.75, low + 0.35), (3.15, low + 0.35), "prepare-data")
    box(axes, 3.2, low, 1.7, h, "tokens\n(.bin, .idx)")
    arrow(axes, (4.95, low + 0.35), (6.55, low + 0.35), "collect_keys")
    box(axes, 6.6, low, 1.7, h, "key statistics")
    arrow(axes, (4.05, y - 0.05), (5.3, low + 0.45))
    arrow(axes, (7.0, low + h + 0.05), (5.9, y + 0.25))
    arrow(axes, (10.1, y - 0.05), (10.1, low + h + 0.05), "")
    axes.text(10.05, (y + low + h) / 2, "export-hf ", ha="right", va="center", fontsize=9)
    box(axes, 9.3, low, 1.6, h, "Hugging Face\nQwen-MoE folder", green)
    axes.text(10.1, low - 0.12, "evaluate, vLLM, llama.cpp", ha="center", va="top", fontsize=9)
    axes.text(4.05, low - 0.12, "pretrain reads them too", ha="center", va="top", fontsize=9)
    words = "Each arrow is one command; what it makes records what made it."
    axes.text(5.5, 3.35, words, ha="center", va="top", fontsize=10)
    save("data_flow")


def save(name: str) -> None:
    plt.savefig(DOCS / f"{name}.png", dpi=150, metadata={"Software": None})
    plt.close()


if __name__ == "__main__":
    method()
    data_flow()
