"""What the gates of a comparison's runs look like at the start, and how far training moved them.

    .venv/bin/python -m tools.experiments.gates configs/compare/balanced.yaml [--seed 1]

One row a run, means over layers, as a table in Markdown; of runs whose router is one gate A [n, D]
(linear, or a mixture with sum pooling). Over the sample of hidden states in the comparison's key statistics:

    rows       the largest norm of a row over the smallest
    cosine     mean cosine of two rows
    common     share of the logits' variance over experts that all tokens have in common
    singular   the largest singular value over the smallest
    load       tokens of the busiest expert over an even share, at the start
    moved      Frobenius norm of what training added to A, over that of A at the start
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.names import TRACKER
from megatron_router_upcycling.diagnostics.stored_router import load_router
from megatron_router_upcycling.errors import Parser, UserError
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.training.run_log import measures
from tools.experiments.comparison import Comparison, read
from tools.experiments.plan import Plan
from tools.experiments.stages import command_line

COLUMNS = ("rows", "cosine", "common", "singular", "load", "moved")


def look(start: Path, end: Path, layer: int, inputs: torch.Tensor) -> torch.Tensor:
    """The figures of COLUMNS for one layer."""
    before, after = load_router(start, layer), load_router(end, layer)
    gate, trained = (
        router.config.kind.gate(router.parameters, router.config, router.hidden_size, torch.float64)["weight"]
        for router in (before, after)
    )
    norms, singular = gate.norm(dim=1), torch.linalg.svdvals(gate)
    pairs = torch.triu_indices(len(gate), len(gate), offset=1)
    cosine = torch.cosine_similarity(gate[pairs[0]], gate[pairs[1]]).mean()
    logits = inputs.double() @ gate.t()
    common = torch.tensor(measures.common_share(logits), dtype=torch.float64)
    load = torch.bincount(before.route(inputs)[1].flatten(), minlength=len(gate)).double()
    moved = (trained - gate).norm() / gate.norm()
    figures = (
        norms.max() / norms.min(),
        cosine,
        common,
        singular[0] / singular[-1],
        load.max() / load.mean(),
    )
    return torch.stack([*figures, moved])


def table(comparison: Comparison, seed: int) -> str:
    plan = Plan(comparison, quick=False)
    if plan.foundation is None:
        raise UserError(f"{comparison.path}: its dense model is not trained here")
    stats = plan.foundation.keys().output
    shape = key_stats_file.load(stats).sample_shape
    assert shape is not None
    inputs = [key_stats_file.read_router_input(stats, layer) for layer in range(shape[0])]
    lines = [f"| run | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name in comparison.runs:
        start, end = plan.convert(name, seed).output, plan.train(name, seed).output
        if (end / TRACKER).is_file():
            found = [look(start, end, layer, sample) for layer, sample in enumerate(inputs)]
            cells = " | ".join(f"{figure:.2f}" for figure in torch.stack(found).mean(dim=0).tolist())
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def work(argv: list[str] | None) -> tuple[str, int]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, metavar="FILE", help="such as configs/compare/balanced.yaml")
    parser.add_argument("--output", type=Path, help="where it was run (default: the file's output:)")
    parser.add_argument("--seed", type=int, default=1, help="of the runs (default: 1)")
    args = parser.parse_args(argv)
    return table(read(args.comparison, args.output, False), args.seed), 0


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
