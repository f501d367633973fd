"""Which Hugging Face tensors make up which Megatron tensor. One table, read in both directions.

Megatron stacks a tensor over layers on axis 0 and over experts on axis 1, and fuses tensors that share an
input. An entry of ``TABLE`` names the Hugging Face tensors whose rows are those of a Megatron tensor;
``tensors`` gives a model's, with their sizes. Either side is made from the other by moving rows, with nothing
computed. Pure: no torch.

Symbols of shapes: V vocabulary, D hidden size, F FFN size, E an expert's, S the shared expert's, d head size,
Q = query heads x d, K = query groups x d, n experts.
"""

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

type Index = tuple[int, ...]
type Segment = tuple[int | None, int, int]  # number of a part (None: zeros), and its rows: start, stop

# How the rows of several tensors become those of one.
PADDED = "padded"  # one tensor, then rows of zeros up to Megatron's vocabulary
STACKED = "stacked"  # one after the other, such as gate, then up
GROUPED = "grouped"  # query group after query group: its query heads, its key, its value


class Part(NamedTuple):
    """A Hugging Face tensor: its name and its shape in symbols."""

    name: str
    shape: tuple[str, ...]


class Row(NamedTuple):
    """A Megatron tensor and the Hugging Face tensors that its rows come from."""

    megatron: str
    parts: tuple[Part, ...]
    order: str = STACKED
    only: str | None = None  # the models that have this tensor: see ``_rows``


def _part(name: str, *shape: str) -> Part:
    return Part(f"{LAYER}.{name}", shape)


def _qkv(kind: str, *columns: str) -> tuple[Part, ...]:
    rows = (("q", "Q"), ("k", "K"), ("v", "K"))
    return tuple(_part(f"self_attn.{name}_proj.{kind}", symbol, *columns) for name, symbol in rows)


def _ffn(place: str, width: str) -> tuple[Part, Part, Part]:
    gate, up = (_part(f"{place}.{name}_proj.weight", width, "D") for name in ("gate", "up"))
    return gate, up, _part(f"{place}.down_proj.weight", "D", width)


DENSE, ROUTED = _ffn("mlp", "F"), _ffn(EXPERT, "E")
# What Qwen2-MoE has in addition to the routed experts: the model's own, or all zeros.
SHARED_EXPERT = _ffn("mlp.shared_expert", "S")
SHARED_EXPERT_GATE = _part("mlp.shared_expert_gate.weight", "1", "D")
EXPERTS_DOWN, SHARED_DOWN = f"{names.EXPERTS}.linear_fc2.weight", f"{names.SHARED_EXPERT}.linear_fc2.weight"

TABLE = (
    Row(names.EMBEDDING, (Part(EMBED_TOKENS, ("V", "D")),), PADDED),
    Row(names.NORMS[0][0], (_part("input_layernorm.weight", "D"),)),
    Row(names.QKV, _qkv("weight", "D"), GROUPED),
    Row(f"{names.QKV_LINEAR}.bias", _qkv("bias"), GROUPED, only="qkv_bias"),
    Row(f"{names.QUERY_NORM}.weight", (_part("self_attn.q_norm.weight", "d"),), only="qk_norm"),
    Row(f"{names.KEY_NORM}.weight", (_part("self_attn.k_norm.weight", "d"),), only="qk_norm"),
    Row(PROJECTION, (_part("self_attn.o_proj.weight", "D", "Q"),)),
    Row(NORM_BEFORE_FFN, (_part("post_attention_layernorm.weight", "D"),)),
    Row(f"{names.FC1}.weight", DENSE[:2], only="dense"),
    Row(f"{names.FC2}.weight", DENSE[2:], only="dense"),
    Row(f"{names.EXPERTS}.linear_fc1.weight", ROUTED[:2], only="moe"),
    Row(EXPERTS_DOWN, ROUTED[2:], only="moe"),
    Row(f"{names.SHARED_EXPERT}.linear_fc1.weight", SHARED_EXPERT[:2], only="shared"),
    Row(SHARED_DOWN, SHARED_EXPERT[2:], only="shared"),
    Row(f"{names.SHARED_EXPERT}.gate_weight", (SHARED_EXPERT_GATE,), only="shared gate"),
    Row(f"{names.FINAL_NORM}.weight", (Part(f"{BODY}norm.weight", ("D",)),)),
    Row(names.OUTPUT_LAYER, (Part(LM_HEAD, ("V", "D")),), PADDED, only="untied"),
)

# The router: moved in an import; in an export computed of its kind's parameters (``Kind.gate``).
GATE = f"{LAYER}.mlp.gate"
LINEAR_ROUTER = Row(f"{names.ROUTER}.weight", (Part(f"{GATE}.weight", ("n", "D")),), only="moe")
IMPORTED = (*TABLE, LINEAR_ROUTER)
# All experts of a layer in two tensors, as transformers 5 saves with ``save_original_format=False``:
# ending of the name -> the parts of each expert, one after the other.
STACKED_EXPERTS = {".mlp.experts.gate_up_proj": ROUTED[:2], ".mlp.experts.down_proj": ROUTED[2:]}


@dataclass(frozen=True)
class Tensor:
    """A Megatron tensor of a model: a matrix or vector, or a stack of them."""

    name: str
    shape: tuple[int, ...]  # of the whole stack
    parts: tuple[Part, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    segments: tuple[Segment, ...]  # its rows, from first to last, by where they come from
    layers: Sequence[int | None]  # those that have it; (None,) if it belongs to no layer
    experts: Sequence[Index]  # (expert,) for each expert of a layer; ((),) if it belongs to none

    def places(self, layer: int | None) -> list[tuple[Index, Index]]:
        """Its matrices of a layer: (layer,) or (layer, expert), and the index of each in the stack."""
        if layer is None:
            return [((), ())]
        place = self.layers.index(layer)
        return [((layer, *expert), (place, *expert)) for expert in self.experts]

    def runs(self, part: int) -> list[tuple[int, int]]:
        """The row ranges (start, stop) that hold a part's rows, in the part's own order."""
        found, position = [], 0
        for number, start, stop in self.segments:
            if number == part:
                found.append((position, position + stop - start))
            position += stop - start
        return found


def tensors(model: QwenModel, table: tuple[Row, ...] = TABLE) -> list[Tensor]:
    """The Megatron tensors of ``model``, in the order of ``table``."""
    return [_tensor(row, layers, model) for row, layers in _rows(model, table)]


def _rows(model: QwenModel, table: tuple[Row, ...]) -> Iterator[tuple[Row, Sequence[int]]]:
    """The rows of ``table`` that ``model`` has, and in which layers."""
    every = range(model.num_layers)
    shared = model.expert_layers if model.shared_expert_size else ()
    layers: dict[str | None, Sequence[int]] = {  # that have a row's tensor
        None: every,
        "qkv_bias": every if model.qkv_bias else (),
        "qk_norm": every if model.qk_norm else (),
        "untied": () if model.tied else every,
        "dense": model.dense_layers,
        "moe": model.expert_layers,
        "shared": shared,
        "shared gate": shared if model.shared_expert_gated else (),
    }
    return ((row, layers[row.only]) for row in table if layers[row.only])


def _tensor(row: Row, layers: Sequence[int], model: QwenModel) -> Tensor:
    shapes = tuple(shape(part, model) for part in row.parts)
    segments = tuple(_segments(row, model))
    stack = (len(layers),) if LAYER in row.parts[0].name else ()
    experts: Sequence[Index] = ((),)
    if EXPERT in row.parts[0].name:
        stack, experts = (*stack, model.num_experts), [(expert,) for expert in range(model.num_experts)]
    height = sum(stop - start for _, start, stop in segments)
    whole, of_layers = (*stack, height, *shapes[0][1:]), layers if stack else (None,)
    return Tensor(row.megatron, whole, row.parts, shapes, segments, of_layers, experts)


def shape(part: Part, model: QwenModel, shared_expert_width: int = 0) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor."""
    sizes = {
        "1": 1,
        "n": model.num_experts,
        "S": model.shared_expert_size or shared_expert_width,
        "V": model.vocab_size,
        "D": model.hidden_size,
        "F": model.ffn_hidden_size,
        "E": model.expert_ffn_size,
        "d": model.kv_channels,
        "Q": model.num_attention_heads * model.kv_channels,
        "K": model.num_query_groups * model.kv_channels,
    }
    return tuple(sizes[symbol] for symbol in part.shape)


def name(part: Part, index: Index) -> str:
    """The name of a Hugging Face tensor of a layer, or of an expert of a layer."""
    return part.name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def within_layer(part: Part, expert: int = 0) -> str:
    """The end of the name of a layer's Hugging Face tensor, after that of the layer."""
    return part.name.removeprefix(LAYER).format(expert=expert)


def _segments(row: Row, model: QwenModel) -> Iterator[Segment]:
    if row.order == GROUPED:
        d, queries = model.kv_channels, model.num_attention_heads // model.num_query_groups
        for group in range(model.num_query_groups):
            for part, heads in enumerate((queries, 1, 1)):
                yield part, group * heads * d, (group + 1) * heads * d
        return
    for number, whole in enumerate(row.parts):
        yield number, 0, shape(whole, model)[0]
    if row.order == PADDED and model.padded_vocab_size > model.vocab_size:
        yield None, model.vocab_size, model.padded_vocab_size


def cut(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The parts of ``ranges``, laid end to end, in ``start`` .. ``stop``: range, first, last, offset."""
    position = 0
    for number, (first, last) in enumerate(ranges):
        low, high = max(start - position, 0), min(stop - position, last - first)
        if low < high:
            yield number, first + low, first + high, position + low - start
        position += last - first


def scale(tensor: Tensor, model: QwenModel) -> float:
    """Hugging Face's values over Megatron's: the Qwen classes have no other place for these factors."""
    if tensor.name == EXPERTS_DOWN:
        return model.routed_scale
    if tensor.name == SHARED_DOWN and not model.shared_expert_gated:
        return 2.0  # cancels a gate of one half (``export_job.SIZE_OF_HALF``)
    return 1.0


def hf_tensors(model: QwenModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's Hugging Face tensors, lazily, since its sizes may be absurd."""
    for row, layers in _rows(model, IMPORTED):
        for layer in layers if LAYER in row.parts[0].name else (None,):
            for expert in range(model.num_experts) if EXPERT in row.parts[0].name else (None,):
                index = tuple(number for number in (layer, expert) if number is not None)
                yield from ((name(part, index), shape(part, model)) for part in row.parts)
