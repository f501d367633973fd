"""Which Hugging Face tensors make up which Megatron tensor. One table, read in both directions.

Megatron stacks a tensor over layers on axis 0 and over experts on axis 1, and fuses tensors that share an
input. A row of ``TABLE`` says which Hugging Face tensors are the rows of a Megatron tensor; ``segments``
says in which order, so that either side is made from the other by moving rows, with nothing computed.
Pure: no torch.

Symbols of shapes: V vocabulary, D hidden size, F FFN size, E an expert's, S the shared expert's, d head size,
Q = query heads x d, K = query groups x d.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.hf.architecture import QwenModel

BODY = "model."  # all of a model but its output layer
LAYER = BODY + "layers.{layer}"
EXPERT = "mlp.experts.{expert}"
EMBED_TOKENS, LM_HEAD = f"{BODY}embed_tokens.weight", "lm_head.weight"
NORM_BEFORE_FFN = names.NORMS[1][0]
PROJECTION = f"{names.PROJECTION}.weight"

# How the rows of several tensors become those of one.
WHOLE = "whole"  # one tensor, as it is
PADDED = "padded"  # one tensor, then rows of zeros up to Megatron's vocabulary
STACKED = "stacked"  # one after the other: gate, then up
GROUPED = "grouped"  # query group after query group: its query heads, its key, its value


class Part(NamedTuple):
    """A Hugging Face tensor: its name and its shape in symbols."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A Megatron tensor and the Hugging Face tensors that its rows come from."""

    megatron: str
    parts: tuple[Part, ...]
    order: str = WHOLE
    only: str | None = None  # what a model must be or have to have this tensor: see ``rows``


def _part(name: str, *shape: str) -> Part:
    return Part(f"{LAYER}.{name}", shape)


# What Qwen2-MoE has beside the routed experts, of a model's own or all zeros.
SHARED_EXPERT = (
    _part("mlp.shared_expert.gate_proj.weight", "S", "D"),
    _part("mlp.shared_expert.up_proj.weight", "S", "D"),
    _part("mlp.shared_expert.down_proj.weight", "D", "S"),
)
SHARED_EXPERT_GATE = _part("mlp.shared_expert_gate.weight", "1", "D")
EXPERTS_DOWN, SHARED_DOWN = f"{names.EXPERTS}.linear_fc2.weight", f"{names.SHARED_EXPERT}.linear_fc2.weight"
OF_EXPERTS = ("moe", "shared", "shared gate")  # rows of layers with experts

TABLE = (
    Row(names.EMBEDDING, (Part(EMBED_TOKENS, ("V", "D")),), PADDED),
    Row(names.NORMS[0][0], (_part("input_layernorm.weight", "D"),)),
    Row(
        names.QKV,
        (
            _part("self_attn.q_proj.weight", "Q", "D"),
            _part("self_attn.k_proj.weight", "K", "D"),
            _part("self_attn.v_proj.weight", "K", "D"),
        ),
        GROUPED,
    ),
    Row(
        f"{names.QKV_LINEAR}.bias",
        (
            _part("self_attn.q_proj.bias", "Q"),
            _part("self_attn.k_proj.bias", "K"),
            _part("self_attn.v_proj.bias", "K"),
        ),
        GROUPED,
        only="qkv_bias",
    ),
    Row(f"{names.QUERY_NORM}.weight", (_part("self_attn.q_norm.weight", "d"),), only="qk_norm"),
    Row(f"{names.KEY_NORM}.weight", (_part("self_attn.k_norm.weight", "d"),), only="qk_norm"),
    Row(PROJECTION, (_part("self_attn.o_proj.weight", "D", "Q"),)),
    Row(NORM_BEFORE_FFN, (_part("post_attention_layernorm.weight", "D"),)),
    Row(
        f"{names.FC1}.weight",
        (_part("mlp.gate_proj.weight", "F", "D"), _part("mlp.up_proj.weight", "F", "D")),
        STACKED,
        only="dense",
    ),
    Row(f"{names.FC2}.weight", (_part("mlp.down_proj.weight", "D", "F"),), only="dense"),
    Row(
        f"{names.EXPERTS}.linear_fc1.weight",
        (_part(f"{EXPERT}.gate_proj.weight", "E", "D"), _part(f"{EXPERT}.up_proj.weight", "E", "D")),
        STACKED,
        only="moe",
    ),
    Row(EXPERTS_DOWN, (_part(f"{EXPERT}.down_proj.weight", "D", "E"),), only="moe"),
    Row(f"{names.SHARED_EXPERT}.linear_fc1.weight", SHARED_EXPERT[:2], STACKED, only="shared"),
    Row(SHARED_DOWN, SHARED_EXPERT[2:], only="shared"),
    Row(f"{names.SHARED_EXPERT}.gate_weight", (SHARED_EXPERT_GATE,), only="shared gate"),
    Row(f"{names.FINAL_NORM}.weight", (Part(f"{BODY}norm.weight", ("D",)),)),
    Row(names.OUTPUT_LAYER, (Part(LM_HEAD, ("V", "D")),), PADDED, only="untied"),
)

GATE = f"{LAYER}.mlp.gate"  # the router's tensors, which are made and not moved (``Kind.gate``)


class Segment(NamedTuple):
    """Rows ``start`` .. ``stop`` of a row's part number ``part``; zeros where it is None."""

    part: int | None
    start: int
    stop: int


def rows(model: QwenModel) -> list[Row]:
    """The tensors that ``model`` has."""
    has = {
        None: True,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "untied": not model.tied,
        "dense": bool(model.dense_layers),
        "moe": bool(model.num_experts),
        "shared": bool(model.shared_expert_size),
        "shared gate": bool(model.shared_expert_size and model.shared_expert_gated),
    }
    return [row for row in TABLE if has[row.only]]


def shape(part: Part, model: QwenModel, shared_expert_width: int = 0) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor."""
    sizes = {
        "1": 1,
        "S": model.shared_expert_size or shared_expert_width,
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.ffn_hidden_size,
        "E": model.expert_ffn_size or model.ffn_hidden_size,
        "d": model.kv_channels,
        "Q": model.num_attention_heads * model.kv_channels,
        "K": model.num_query_groups * model.kv_channels,
    }
    return tuple(sizes[symbol] for symbol in part.shape)


def layers(row: Row, model: QwenModel) -> Sequence[int]:
    """The layers that have this tensor; none where it is of no layer."""
    if "{layer}" not in row.parts[0].name:
        return ()
    if row.only == "dense":
        return model.dense_layers
    return model.expert_layers if row.only in OF_EXPERTS else range(model.num_layers)


def stack(row: Row, model: QwenModel) -> tuple[int, ...]:
    """The sizes of the axes that Megatron's tensor is stacked on: (), (layers,) or (layers, experts).

    Layers are those that have it.
    """
    name = row.parts[0].name
    return (len(layers(row, model)),) * ("{layer}" in name) + (model.num_experts,) * ("{expert}" in name)


def place(row: Row, index: tuple[int, ...], model: QwenModel) -> tuple[int, ...]:
    """Where in Megatron's stack the tensors of (layer, ...) are."""
    return (layers(row, model).index(index[0]), *index[1:]) if index else ()


def indices(row: Row, model: QwenModel) -> Iterator[tuple[int, ...]]:
    """Every layer, or layer and expert, that has this tensor, one after the other."""
    if not stack(row, model):
        yield ()
        return
    for layer in layers(row, model):
        yield from indices_in(layer, row, model)


def indices_in(layer: int, row: Row, model: QwenModel) -> list[tuple[int, ...]]:
    """Of one layer: (layer,), or (layer, expert) for every expert, or none where it has no such tensor."""
    if layer not in layers(row, model):
        return []
    if len(stack(row, model)) == 1:
        return [(layer,)]
    return [(layer, expert) for expert in range(model.num_experts)]


def name(part: Part, index: tuple[int, ...]) -> str:
    """The name of a Hugging Face tensor of a layer, or of an expert of a layer."""
    return part.name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def segments(row: Row, model: QwenModel) -> list[Segment]:
    """The rows of Megatron's tensor, from first to last, by where they come from."""
    heights = [shape(part, model)[0] for part in row.parts]
    if row.order == GROUPED:
        d, queries = model.kv_channels, model.num_attention_heads // model.num_query_groups
        return [
            Segment(part, group * heads * d, (group + 1) * heads * d)
            for group in range(model.num_query_groups)
            for part, heads in enumerate((queries, 1, 1))
        ]
    found = [Segment(part, 0, height) for part, height in enumerate(heights)]
    if row.order == PADDED and model.padded_vocab_size > heights[0]:
        found.append(Segment(None, heights[0], model.padded_vocab_size))
    return found


def runs(row: Row, part: int, model: QwenModel) -> list[tuple[int, int]]:
    """Where a part's rows stand in Megatron's tensor: (start, stop), in the part's own order."""
    found, position = [], 0
    for segment in segments(row, model):
        height = segment.stop - segment.start
        if segment.part == part:
            found.append((position, position + height))
        position += height
    return found


def cut(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What of ``ranges``, laid end to end, makes up the rows ``start`` .. ``stop``.

    Yields:
        The number of a range, and its rows (first, last).
    """
    position = 0
    for number, (first, last) in enumerate(ranges):
        low, high = max(start - position, 0), min(stop - position, last - first)
        if low < high:
            yield number, first + low, first + high
        position += last - first


def megatron_shape(row: Row, model: QwenModel) -> tuple[int, ...]:
    """The global shape of Megatron's tensor."""
    height = sum(segment.stop - segment.start for segment in segments(row, model))
    return (*stack(row, model), height, *shape(row.parts[0], model)[1:])


def hf_tensors(model: QwenModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the Hugging Face tensors that the table covers."""
    for row in rows(model):
        for index in indices(row, model):
            for part in row.parts:
                yield name(part, index), shape(part, model)


def num_elements(model: QwenModel) -> int:
    """Elements of all Megatron tensors in the table."""
    return sum(math.prod(megatron_shape(row, model)) for row in rows(model))
