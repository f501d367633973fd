"""Analyse how a converted checkpoint's routers would start, before training and without Megatron.

The inputs are hidden states of the dense model sampled in the key statistics, or random ones scaled by the
gain of the norm before the router. Both approximate the first step: with softmax before top-k even the real
samples differ from it, because the outputs of earlier MoE layers are scaled down.

Symbols: S sampled tokens, n experts, k experts a token, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE
from megatron_router_upcycling.checkpoint.format.files import locate
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.diagnostics.stored_router import read_layer, read_router, router_layers
from megatron_router_upcycling.errors import UserError, error_as
from megatron_router_upcycling.initialisation.heads import cosine_similarity
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.layers.statistics import routing_sums
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.likeness import tied_experts
from megatron_router_upcycling.training.run_log import measures

MISFIT = (RuntimeError, IndexError, ValueError)  # of shapes that do not go together
RANDOM_TOKENS = 1024
NAMED = 8  # most experts or layers that a warning names
TOKENS_FOR_TIES = 64  # random tokens, enough to distinguish any two different gates
SATURATED = 0.9  # mean largest probability from which softmax passes hardly any gradient
# Routing entropies as fractions of even routing (ln n). In docs/comparison/sharpness (a small model with 8
# experts), starts at 0.38 to 0.87 ended lowest, for routers from heads and for random ones; 0.19 and 0.96
# ended above them. The limits are the midpoints between these.
SURE, EVEN, CALIBRATED = 0.29, 0.91, 0.72
COMMON = 0.25  # share of the logits' variance that all tokens have in common; random gates have 0.11 to 0.16
# Title in the table -> entry of ``_look``'s result for a layer, and its format.
COLUMNS = {
    "layer": ("layer", "d"),
    "keys alike": ("mean_cosine", ".3f"),
    "most alike": ("max_cosine", ".3f"),
    "ties": ("num_ties", "d"),
    "busiest/mean": ("load_max_over_mean", ".2f"),
    "idle": ("dead_experts", "d"),
    "entropy": ("entropy", ".3f"),
    "largest p": ("top1_probability", ".3f"),
    "k weights": ("softmax_first", ".3f"),
}
LEGEND = """\
keys alike, most alike: mean and largest cosine between experts' keys (1: one direction); ties: pairs
of experts that no token can tell apart; busiest/mean: the busiest expert's tokens over an even share;
idle: experts without a token; entropy, largest p: how sure the router is; k weights: the chosen ones'
sum
"""


def describe(root: Path, stats: Sequence[Path] = ()) -> str:
    """The start of each layer's routing as a table with warnings; "" for a checkpoint without routers.

    Routes the ``router_input`` of ``stats``, or without any, of the manifest's key statistics. If these
    cannot be used, random tokens are routed, and the title says why.
    """
    checkpoint = open_checkpoint(root)
    record = manifest.read(checkpoint.root)
    if record is None or not router_layers(checkpoint):
        if stats:
            raise UserError(f"--key-stats {stats[0]}: {checkpoint.root} has no routers to route samples with")
        return ""
    router = manifest.router_config(record, checkpoint.root / manifest.NAME)
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")
    if missing := [name for name in sizes if not isinstance(getattr(checkpoint.args, name, None), int)]:
        raise UserError(f"{root}: its arguments tell no {missing[0]}; convert the model again")
    sources, why_none = _samples(checkpoint, record, stats)
    inputs = f"hidden states of the dense model, sampled in {', '.join(map(str, sources))}"
    if not sources:
        inputs = (
            f"{RANDOM_TOKENS} random tokens, scaled by the norm's gain, which route more evenly than real"
            f" ones ({why_none}; name key statistics collected with --router-samples as --key-stats)"
        )
    with error_as(MISFIT, f"{root}: its routers do not fit {manifest.NAME}"):
        found = [_look(checkpoint, router, layer, sources) for layer in router_layers(checkpoint)]
        shares = _shares_of_texts(checkpoint, router, sources) if len(sources) > 1 else None
    title = f"routing at the start, of {inputs}:"
    said = [*_warnings(found, router, record)]
    if not record.get("more_experts"):  # whose routers were trained
        said += _hints(found, router, record, bool(sources))
    texts = [] if shares is None else ["", *_texts_table(sources, shares)]
    equal = not (record.get("experts") or record.get("more_experts"))  # the experts of a fresh conversion
    first_step = _expectation(found, router) if equal else []
    lines = [title, *_table(found), LEGEND, *first_step, *texts, *[""] * bool(said), *said]
    return "\n".join(lines)


def texts(root: Path) -> tuple[list[str], list[list[float]]] | None:
    """The names of the texts that a checkpoint's routers were made to tell apart, and which experts each goes
    to: shares of its choices [k, n], means over layers. None without several texts, or where they are gone.
    """
    record = manifest.read(root)
    if record is None or len(manifest.entries(record, "key_stats", root)) < 2:
        return None
    try:
        checkpoint = open_checkpoint(root)
        sources, _ = _samples(checkpoint, record, ())
        router = manifest.router_config(record, checkpoint.root / manifest.NAME)
        shares = _shares_of_texts(checkpoint, router, sources) if sources else None
    except (UserError, *MISFIT):
        return None
    return None if shares is None else ([path.stem for path in sources], shares.tolist())


def _shares_of_texts(checkpoint: Checkpoint, router: RouterConfig, sources: Sequence[Path]) -> Tensor:
    """Each text's choices by expert, [k, n], as a share of its own, means over layers."""
    layers = router_layers(checkpoint)
    total = torch.zeros(len(sources), router.num_experts, dtype=torch.float64)
    for layer in layers:
        stored = read_router(checkpoint, router, layer)
        for text, path in enumerate(sources):
            _, experts = stored.route(key_stats_file.read_router_input(path, layer))
            total[text] += torch.bincount(experts.flatten(), minlength=router.num_experts) / experts.numel()
    return total / len(layers)


def _texts_table(sources: Sequence[Path], shares: Tensor) -> Iterator[str]:
    yield "which experts each text goes to: shares of its choices, means over layers"
    width = max(len(path.stem) for path in sources)
    yield " " * width + "".join(f"{expert:>6}" for expert in range(shares.shape[1]))
    for path, row in zip(sources, shares.tolist(), strict=True):
        yield f"{path.stem:<{width}}" + "".join(f"{share:>6.0%}" for share in row)


def _samples(
    checkpoint: Checkpoint, record: dict[str, Any], asked: Sequence[Path]
) -> tuple[tuple[Path, ...], str]:
    """The key statistics to route, or none and the reason, which is raised if they were ``asked`` for."""
    recorded = manifest.entries(record, "key_stats", checkpoint.root)
    source = record.get("source")
    paths = [*asked] or [Path(str(one.get("path"))) for one in recorded]
    if not paths:
        return (), "the checkpoint was made without key statistics"
    dense = source.get("digest") if isinstance(source, dict) else None
    try:
        sampled = [_check_samples(checkpoint, path, dense) for path in paths]
    except UserError as error:
        if asked:
            raise
        return (), str(error)
    if not all(sampled):
        return (), f"{paths[sampled.index(False)]} holds no samples"
    return tuple(paths), ""


def _check_samples(checkpoint: Checkpoint, path: Path, dense: str | None) -> bool:
    """Whether key statistics have samples; UserError if they are of another model than ``dense``."""
    layers, width = checkpoint.args.num_layers, checkpoint.args.hidden_size
    stats = key_stats_file.load(path)
    shape = stats.sample_shape
    if shape and (shape[0], shape[2]) != (layers, width):
        raise UserError(
            f"--key-stats {path}: its router_input is {shape} and the model has {layers} layers of width"
            f" {width}; name the statistics of the dense model that was converted"
        )
    if dense and stats.metadata.get("checkpoint_digest", dense) != dense:
        raise UserError(f"--key-stats {path}: of another model; name those of the one that was converted")
    return shape is not None


def _inputs(checkpoint: Checkpoint, layer: int, sources: Sequence[Path]) -> Tensor:
    """The input of the layer's router, [S, D] in float32."""
    if sources:
        return torch.cat([key_stats_file.read_router_input(source, layer) for source in sources])
    generator = torch.Generator().manual_seed(layer)
    tokens = torch.randn(RANDOM_TOKENS, checkpoint.args.hidden_size, generator=generator)
    fused, separate = names.NORMS[1]  # the norm before the router
    is_fused = {fused, names.at_layer(fused, layer)} & checkpoint.tensors.keys()
    gain = read_layer(checkpoint, fused if is_fused else separate, layer)
    # With --apply-layernorm-1p the checkpoint holds the gain minus 1.
    return tokens * (gain + bool(getattr(checkpoint.args, ARCHITECTURE["apply_layernorm_1p"], False)))


def _look(
    checkpoint: Checkpoint, router: RouterConfig, layer: int, sources: Sequence[Path]
) -> dict[str, Any]:
    """``measures.summarise`` of one layer's routing, and the other entries of COLUMNS."""
    stored = read_router(checkpoint, router, layer)
    logits = stored.logits(_inputs(checkpoint, layer, sources))
    if logits.shape[1] != router.num_experts:
        raise ValueError(f"layer {layer}: {logits.shape[1]} experts")
    mean, most = None, None  # for routers without keys
    if router.kind.expert_keys:
        key = stored.parameters[router.kind.expert_keys]
        pairs = cosine_similarity(key)[tuple(torch.triu_indices(len(key), len(key), offset=1))]
        mean, most = (float(pairs.mean()), float(pairs.max())) if len(pairs) else (math.nan, math.nan)
    tied = tied_experts(logits, router.granularity)
    decided = {first: measures.choose(logits, router.top_k, first) for first in (True, router.pre_softmax)}
    sums = routing_sums(*decided[router.pre_softmax], top_k=router.top_k)
    return measures.summarise(sums) | {
        "layer": layer,
        "mean_cosine": mean,
        "max_cosine": most,
        "ties": tied,
        "num_ties": len(tied),
        "common": measures.common_share(logits),
        # The mean sum of the k weights where softmax comes before top-k.
        "softmax_first": float(decided[True][1].sum(dim=1).mean()),
    }


def _table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "".join(f"{title:>13}" for title in COLUMNS)
    for row in found:
        cells = ("–" if row[name] is None else f"{row[name]:{form}}" for name, form in COLUMNS.values())
        yield "".join(f"{cell:>13}" for cell in cells)


def _expectation(found: list[dict[str, Any]], router: RouterConfig) -> list[str]:
    sums = [row["softmax_first"] for row in found]
    return [
        f"prepared for softmax {'before' if router.pre_softmax else 'after'} top-k. While experts are equal,"
        " the output of a layer's experts is about the dense FFN's times the sum of the k weights:",
        f"  softmax before top-k   x {sum(sums) / len(sums):.3f} in the mean over layers, {min(sums):.3f} to"
        f" {max(sums):.3f}: the loss jumps at step 0",
        "  softmax after top-k    x 1: no jump",
    ]


def _warnings(found: list[dict[str, Any]], router: RouterConfig, record: dict[str, Any]) -> Iterator[str]:
    n = router.num_experts
    # Effective number of experts: exp of the entropy of the load.
    loads = {row["layer"]: torch.tensor(row["load"]) for row in found}
    effective = {layer: float(torch.special.entr(load).sum().exp()) for layer, load in loads.items()}
    collapsed = [layer for layer, count in effective.items() if count < n / 2]
    if collapsed and n > router.top_k:
        worst = min(collapsed, key=effective.__getitem__)
        yield (
            f"warning: routing would start collapsed in {_named(collapsed)}: at worst (layer {worst}) it is"
            f" as uneven as if {effective[worst]:.1f} of {n} experts did all the work. Wide differences"
            " between keys, such as biases give, do this"
        )
    if saturated := [row["layer"] for row in found if row["top1_probability"] > SATURATED]:
        yield (
            f"warning: routing would start saturated in {_named(saturated)}: the largest probability is above"
            f" {SATURATED} in the mean, and softmax passes little gradient"
        )
    if tied := _tied({row["layer"]: row["ties"] for row in found}, record):
        yield tied


def _hints(
    found: list[dict[str, Any]], router: RouterConfig, record: dict[str, Any], is_sampled: bool
) -> Iterator[str]:
    """Say where a balanced or calibrated start would help, and which flags make one.

    Random tokens route more evenly than real ones, so without samples no layer is reported as too even.
    """
    common = {row["layer"]: row["common"] for row in found if row["common"] > COMMON and is_sampled}
    init = manifest.init_config(record, manifest.NAME)
    if common and "center" in router.kind.starts and not init.center:
        yield (
            f"hint: some experts would be ahead for all tokens alike in {_named(list(common))} (at most"
            f" {max(common.values()):.0%} of the logits' variance is common to all tokens). In comparisons of"
            " a small model such starts ended behind balanced ones: convert again with --center --equalize"
            " (docs/comparison.md)"
        )
    even = math.log(router.num_experts)
    entropies = {row["layer"]: row["entropy"] for row in found}
    sure = [layer for layer, entropy in entropies.items() if entropy < SURE * even]
    spread = [layer for layer, entropy in entropies.items() if entropy > EVEN * even and is_sampled]
    suits = "target_entropy" in router.kind.starts
    if not (sure or spread) or not suits or init.target_entropy is not None:
        return
    where = [f"very sure of themselves in {_named(sure)}"] * bool(sure)
    where += [f"next to even in {_named(spread)}"] * bool(spread)
    lowest, highest = (pick(entropies[layer] for layer in sure + spread) for pick in (min, max))
    yield (
        f"hint: routers would start {' and '.join(where)} (entropies of {lowest:.2f} to {highest:.2f} nats,"
        f" even routing has {even:.2f}). In comparisons of a small model such starts ended behind calibrated"
        f" ones: convert again with --target-entropy {CALIBRATED * even:.1f} (docs/comparison.md)"
    )


def warn_of_ties(root: str | Path) -> str | None:
    """The warning about tied experts in the converted checkpoint ``root``; None once it has trained."""
    root, folder = locate(Path(root))
    record = manifest.read(root)
    if record is None or folder.name != names.RELEASE:
        return None
    checkpoint = open_checkpoint(root)
    router = manifest.router_config(record, checkpoint.root / manifest.NAME)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS_FOR_TIES, checkpoint.args.hidden_size, generator=generator)
    found = {
        layer: tied_experts(read_router(checkpoint, router, layer).logits(tokens), router.granularity)
        for layer in router_layers(checkpoint)
    }
    return _tied(found, record)


def _tied(ties: dict[int, tuple[tuple[int, int], ...]], record: dict[str, Any]) -> str | None:
    """A warning that names tied experts and a remedy for the manifest ``record``; None without ties."""
    found = {layer: pairs for layer, pairs in ties.items() if pairs}
    router, init = manifest.router_config(record, manifest.NAME), manifest.init_config(record, manifest.NAME)
    if not found:
        return None
    stats = next(iter(manifest.entries(record, "key_stats", manifest.NAME)), {}).get("metadata") or {}
    shares_keys = stats.get("num_query_groups", 0) < stats.get("num_attention_heads", 0)
    if record.get("more_experts"):
        remedy = "convert again with a larger --router-noise"
    elif init.of_heads(router) and init.head_key != "attended" and shares_keys:
        remedy = "convert again with --head-key attended, from key statistics that collect_keys writes now"
    elif router.num_routers is not None and router.num_routers < router.num_copies:
        remedy = f"convert again with --num-routers {router.num_copies}"
    elif router.kind.of_heads:
        remedy = "convert again with --config configs/ablations/random_keys.yaml, whose keys differ"
    elif init.gate == "heads":
        remedy = "convert again with --gate random"
    else:
        remedy = "convert again with another --seed"
    layer, pairs = next(iter(found.items()))
    shown = ", ".join(f"{a} and {b}" for a, b in pairs[:NAMED]) + ", ..." * (len(pairs) > NAMED)
    return (
        f"warning: experts are tied in {_named(list(found))} (layer {layer}: {shown}): their gates and their"
        f" weights are equal, so that training keeps them equal; {remedy}"
    )


def _named(layers: list[int]) -> str:
    """Layers as text: the first NAMED by number, and how many more there are."""
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:NAMED]))}{more}"
