"""How a converted checkpoint's routers would start: before any GPU hour is spent, and without Megatron.

The inputs are hidden states of the dense model, which the key statistics hold a sample of, or random ones of
the size that the norm before the router gives them. Both stand for the first step; with softmax before
top-k, where layers before have shrunk, even real samples are an approximation.

Symbols: S sampled tokens, n experts, k experts a token, D hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.diagnostics import ties
from megatron_router_upcycling.diagnostics.stored_router import read_layer, read_router, router_layers
from megatron_router_upcycling.diagnostics.ties import named
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.initialisation.heads import cosine_similarity
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.likeness import tied_experts
from megatron_router_upcycling.training.run_log import measures

RANDOM_TOKENS = 1024
SATURATED = 0.9  # mean largest probability from which softmax passes next to no gradient
# Routing entropies as shares of even routing (ln n). In docs/comparison/sharpness, of a small model with 8
# experts, starts at 0.38 to 0.87 ended lowest, of routers of heads and of random ones; 0.19 and 0.96 ended
# behind them. The limits are the middles in between.
SURE, EVEN, CALIBRATED = 0.29, 0.91, 0.72

LEGEND = (
    "keys alike, most alike: mean and largest cosine between experts' keys (1: one direction); ties: pairs",
    "of experts that no token can tell apart; busiest/mean: the busiest expert's tokens over an even share;",
    "idle: experts without a token; entropy, largest p: how sure the router is; k weights: the chosen ones'",
    "sum",
)


@dataclass(frozen=True)
class LayerStart:
    """One layer's router before training. Cosines are of experts' keys, None for kinds without."""

    layer: int
    mean_cosine: float | None
    max_cosine: float | None
    ties: tuple[tuple[int, int], ...]  # experts of different copies that no token can tell apart
    routing: dict[str, Any]  # measures.summarise, with the order of softmax and top-k that was recorded
    softmax_first: float  # mean sum of the k weights where softmax comes before top-k

    @property
    def effective_experts(self) -> float:
        """How many evenly loaded experts would be as uneven: exp of the entropy of the load."""
        return math.exp(-sum(share * math.log(share) for share in self.routing["load"] if share))


def describe(root: Path, stats: Path | None) -> str:
    """The start of each layer's routing as a table, and plain warnings; "" for what has no routers.

    Args:
        stats: key statistics, whose ``router_input`` is routed; None takes those that the manifest names.
            Where they have none, random tokens stand in.
    """
    checkpoint = open_checkpoint(root)
    record = manifest.read(checkpoint.root)
    if record is None or not router_layers(checkpoint):
        if stats is not None:
            raise UserError(
                f"--key-stats {stats}: {checkpoint.root} has no routers to route its samples with"
            )
        return ""
    router = manifest.router_config(record, checkpoint.root / manifest.NAME)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels"):
        if not isinstance(getattr(checkpoint.args, name, None), int):
            raise UserError(f"{root}: its arguments tell no {name}; convert the model again")
    num_layers = int(checkpoint.args.num_layers)
    if stats is None:
        source = _recorded(record, num_layers)
    else:
        source = stats if _holds_samples(stats, num_layers) else None
    found = []
    for layer in router_layers(checkpoint):
        try:
            found.append(_look(checkpoint, router, layer, source))
        except (RuntimeError, IndexError, ValueError) as error:  # shapes that do not go together
            raise UserError(
                f"{root}: layer {layer}'s router does not fit {manifest.NAME} ({reason(error)})"
            ) from None
    title = f"routing at the start, of {_describe_inputs(source, stats)}:"
    return "\n".join(
        [
            title,
            *_table(found),
            *_expectation(found, router),
            *_warnings(found, router, record, source is not None),
        ]
    )


def _holds_samples(stats: Path, num_layers: int) -> bool:
    """Whether key statistics hold samples of the routers' inputs: of each layer, or none."""
    key_stats_file.load(stats)  # says what is wrong with it
    sampled = _num_layers_sampled(stats)
    if sampled not in (0, num_layers):
        raise UserError(
            f"--key-stats {stats}: holds samples of router inputs (router_input) for {sampled} layers and"
            f" the model has {num_layers}; collect its dense model's statistics with --router-samples 512"
        )
    return sampled > 0


def _describe_inputs(source: Path | None, stats: Path | None) -> str:
    if source is not None:
        return f"hidden states of the dense model, sampled in {source}"
    reason = f"{stats} holds no samples; " if stats else ""
    return (
        f"{RANDOM_TOKENS} random tokens, normal and scaled by the norm's gain, which route more evenly"
        f" than real ones ({reason}name key statistics that were collected with --router-samples as"
        " --key-stats)"
    )


def _recorded(record: dict[str, Any], num_layers: int) -> Path | None:
    """The key statistics that the manifest names, where they are still there and hold samples."""
    named = record.get("key_stats")
    path = named.get("path") if isinstance(named, dict) else None
    return Path(path) if isinstance(path, str) and _num_layers_sampled(path) == num_layers else None


def _num_layers_sampled(path: str | Path) -> int:
    """Layers that the key statistics in ``path`` hold ``router_input`` of; 0 where there is none."""
    if not Path(path).is_file():
        return 0
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_slice("router_input").get_shape()[0] if "router_input" in set(file.keys()) else 0
    except (safetensors.SafetensorError, OSError, ValueError):
        return 0


def _inputs(checkpoint: Checkpoint, layer: int, source: Path | None) -> Tensor:
    """What the layer's router would see, [S, D] in float32."""
    hidden = int(checkpoint.args.hidden_size)
    if source is not None:
        tokens = key_stats_file.read_router_input(source, layer)
        if tokens.shape[1] != hidden:
            raise UserError(
                f"--key-stats {source}: its router_input is {tokens.shape[1]} wide and the model {hidden};"
                " name the statistics of the dense model that was converted"
            )
        return tokens
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(RANDOM_TOKENS, hidden, generator=generator) * _norm_gain(checkpoint, layer)


def _norm_gain(checkpoint: Checkpoint, layer: int) -> Tensor:
    """What the norm before the router multiplies by, [D] in float32."""
    fused, separate = names.NORMS[1]
    is_fused = {fused, names.at_layer(fused, layer)} & checkpoint.tensors.keys()
    weight = read_layer(checkpoint, fused if is_fused else separate, layer)
    # With --apply-layernorm-1p the checkpoint holds the gain's distance from 1.
    return weight + bool(getattr(checkpoint.args, ARCHITECTURE["apply_layernorm_1p"], False))


def _look(checkpoint: Checkpoint, router: RouterConfig, layer: int, source: Path | None) -> LayerStart:
    tokens, n = _inputs(checkpoint, layer, source), router.num_experts
    stored = read_router(checkpoint, router, layer)
    logits = stored.logits(tokens)
    if logits.shape[1] != n:
        raise UserError(f"{checkpoint.root}: layer {layer}'s router is no router of {n} experts")
    cosines: tuple[float | None, float | None] = (None, None)
    if router.kind.expert_keys:
        cosines = _cosines(stored.parameters[router.kind.expert_keys])
    decided = {first: measures.choose(logits, router.top_k, first) for first in (True, router.pre_softmax)}
    return LayerStart(
        layer,
        *cosines,
        tied_experts(logits, router.granularity),
        measures.summarise(measures.routing_sums(*decided[router.pre_softmax], top_k=router.top_k)),
        float(decided[True][1].sum(dim=1).mean()),
    )


def _cosines(key: Tensor) -> tuple[float, float]:
    """Mean and largest cosine of every two keys."""
    pairs = cosine_similarity(key)[tuple(torch.triu_indices(len(key), len(key), offset=1))]
    return (float(pairs.mean()), float(pairs.max())) if len(pairs) else (math.nan, math.nan)


def _table(found: list[LayerStart]) -> list[str]:
    titles = ["layer", "keys alike", "most alike", "ties"]
    titles += ["busiest/mean", "idle", "entropy", "largest p", "k weights"]
    rows = [titles, *map(_cells, found)]
    return [*("".join(f"{cell:>13}" for cell in row) for row in rows), *LEGEND]


def _cells(row: LayerStart) -> list[str]:
    routing = row.routing
    cells = [str(row.layer), _number(row.mean_cosine, ".3f"), _number(row.max_cosine, ".3f")]
    cells += [str(len(row.ties)), f"{routing['load_max_over_mean']:.2f}", str(routing["dead_experts"])]
    cells += [f"{routing['entropy']:.3f}", f"{routing['top1_probability']:.3f}"]
    return [*cells, f"{row.softmax_first:.3f}"]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _expectation(found: list[LayerStart], router: RouterConfig) -> list[str]:
    """What step 0 does to the FFN's output under both orders of softmax and top-k."""
    sums = [row.softmax_first for row in found]
    order = "before" if router.pre_softmax else "after"
    mean = sum(sums) / len(sums)
    return [
        "",
        f"prepared for softmax {order} top-k. While experts are equal, the output of a layer's experts is the"
        " dense FFN's times the sum of the k weights:",
        f"  softmax before top-k   x {mean:.3f} in the mean over layers, {min(sums):.3f} to {max(sums):.3f}:"
        " the loss jumps at step 0",
        "  softmax after top-k    x 1: no jump",
        "(an estimate of the output's size; how far the loss jumps, an evaluation before training tells)",
    ]


def _warnings(
    found: list[LayerStart], router: RouterConfig, record: dict[str, Any], is_sampled: bool
) -> list[str]:
    warnings = [*_collapsed(found, router), *_saturated(found), *_tied(found, record)]
    hints = _uncalibrated(found, router, record, is_sampled)
    lines = [*(f"warning: {warning}" for warning in warnings), *hints]
    return ["", *lines] if lines else []


def _uncalibrated(
    found: list[LayerStart], router: RouterConfig, record: dict[str, Any], is_sampled: bool
) -> Iterator[str]:
    """Where a calibrated start would help, and the flag that makes one.

    Random tokens route more evenly than real ones, so that without samples a layer is never called too even.
    """
    even = math.log(router.num_experts)
    entropies = {row.layer: row.routing["entropy"] for row in found}
    sure = [layer for layer, entropy in entropies.items() if entropy < SURE * even]
    spread = [layer for layer, entropy in entropies.items() if entropy > EVEN * even and is_sampled]
    suits = "target_entropy" in router.kind.starts
    if not (sure or spread) or not suits:
        return
    if manifest.init_config(record, manifest.NAME).target_entropy is not None:
        return
    where = [f"very sure of themselves in {named(sure)}"] * bool(sure)
    where += [f"next to even in {named(spread)}"] * bool(spread)
    flagged = [entropies[layer] for layer in sure + spread]
    lowest, highest = min(flagged), max(flagged)
    said = f"{lowest:.2f}" if f"{lowest:.2f}" == f"{highest:.2f}" else f"{lowest:.2f} to {highest:.2f}"
    yield (
        f"hint: routers would start {' and '.join(where)} (entropies of {said} nats, even routing has"
        f" {even:.2f}). In comparisons of a small model such starts ended behind calibrated ones: convert"
        f" again with --target-entropy {CALIBRATED * even:.1f} (docs/comparison.md)"
    )


def _collapsed(found: list[LayerStart], router: RouterConfig) -> Iterator[str]:
    n = router.num_experts
    collapsed = [row for row in found if row.effective_experts < n / 2]
    if collapsed and n > router.top_k:
        worst = min(collapsed, key=lambda row: row.effective_experts)
        yield (
            f"routing would start collapsed in {named([row.layer for row in collapsed])}: at worst (layer"
            f" {worst.layer}) it is as uneven as if {worst.effective_experts:.1f} of {n} experts did all the"
            " work. Wide differences between keys, such as biases give, do this"
        )


def _saturated(found: list[LayerStart]) -> Iterator[str]:
    if saturated := [row.layer for row in found if row.routing["top1_probability"] > SATURATED]:
        yield (
            f"routing would start saturated in {named(saturated)}: the largest probability is above"
            f" {SATURATED} in the mean, and softmax passes little gradient"
        )


def _tied(found: list[LayerStart], record: dict[str, Any]) -> Iterator[str]:
    if warning := ties.describe({row.layer: row.ties for row in found if row.ties}, record):
        yield warning
