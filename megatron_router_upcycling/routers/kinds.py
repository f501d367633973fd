"""Every kind of router: one row of ``KINDS`` each, and the pure functions that the row names.

Whatever depends on a router's kind is asked of its row: ``RouterConfig.kind`` is the row of its options.
To add a kind, write its row here; a class of its own (``Kind.module``) only where ``routers.base`` cannot
train it from the row. The command line, the converter, verify, plan, inspect, training and the export to
Hugging Face take it from there.

Pure: imports neither Megatron nor, before a function is called, torch.

Symbols: m routers, n experts, c keys an expert, d' router width, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.fold import fold, pool_logits
from megatron_router_upcycling.routers.shape import router_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

type Values = dict[str, "Tensor"]

LOCALITY_LOSS_COEFF = 0.01
# Names among Megatron's MoE metrics.
DROPPED = "dropped token share"
LOCALITY = "locality_loss"
LOCAL = "local token share"


class Options(Protocol):
    """What a kind reads of a ``RouterConfig``, which says what each field means."""

    @property
    def router(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def num_routers(self) -> int | None: ...
    @property
    def pooling(self) -> str: ...
    @property
    def pre_softmax(self) -> bool: ...
    @property
    def granularity(self) -> int: ...
    @property
    def locality_loss_coeff(self) -> float | None: ...


@dataclass(frozen=True)
class Sizes:
    """What a router's parameters depend on in the model, by Megatron's names."""

    hidden_size: int
    num_attention_heads: int
    kv_channels: int
    add_bias_linear: bool = False  # whether Megatron's linear layers, and its routers, have biases

    @classmethod
    def of(cls, model: Any, add_bias_linear: bool = False) -> "Sizes":
        """The sizes of what has attributes of these names."""
        return cls(model.hidden_size, model.num_attention_heads, model.kv_channels, add_bias_linear)


@dataclass(frozen=True)
class Parameter:
    """A parameter of one layer's router."""

    name: str  # behind ``decoder.layers.mlp.router.``
    shape: tuple[int, ...]
    per_expert: bool = False  # axis 0 counts experts: shards of one copy start equal
    constant: float | None = None  # what it starts as; None: N(0, init_method_std)


def _as_stored(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    return {name: value.to(dtype) for name, value in values.items()}


def linear_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    return hidden @ gate["weight"].t()


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of router.

    - ``words``: what a layer has; ``card``: in a model card, after "the router is". Both are format
      strings that may name fields of ``router``, the options.
    - ``parameters``: of one layer, without Megatron's bias. Raises UserError where options and model do not
      fit.
    - ``gate``: (values, options, D, dtype) -> the tensors that logits are computed from, one of them named
      ``weight``: the parameters folded as far as they can be. An exported model holds these.
    - ``logits``: (gate, hidden states [..., D], options) -> [..., n]. It reads of the options what
      ``RouterConfig.to_dict`` has, and uses nothing of its module but ``helpers``: an exported model that
      no stock class holds carries the source of both.
    - ``settle``: options -> values for those that were left open. Raises UserError for what cannot be.
    - ``not_stock``: why a stock Mixture-of-Experts class of transformers does not compute these logits,
      None where it does: the gate is then one matrix [n, D]; ``exported``: how the gate stands in a folder
      that is not stock.
    """

    name: str
    words: str
    card: str
    parameters: Callable[[Options, Sizes], tuple[Parameter, ...]]
    gate: Callable[[Values, Options, int, "torch.dtype"], Values] = _as_stored
    logits: Callable[[Values, "Tensor", Options], "Tensor"] = linear_logits
    helpers: tuple[Callable[..., Any], ...] = ()
    settle: Callable[[Options], dict[str, Any]] = lambda options: {}
    not_stock: Callable[[Options], str | None] = lambda options: None
    exported: str = "as it is"
    # The class that trains it, MODULE:NAME, called with Megatron's (config, pg_collection, is_mtp_layer) and
    # router=options; None: Megatron's own TopKRouter.
    module: str | None = "megatron_router_upcycling.routers.base:OwnParametersRouter"
    has_bias: bool = True  # where Megatron's linear layers have biases
    of_heads: bool = False  # starts from attention heads and key statistics, otherwise as ``Parameter`` says
    options: tuple[str, ...] = ()  # fields of RouterConfig that are this kind's and not every kind's
    own_starts: tuple[str, ...] = ()  # likewise, fields of InitConfig
    scaled: str | None = None  # the parameter that logits are proportional to
    expert_keys: str | None = None  # the parameter whose rows inspect compares by their cosine
    top_k: int = 2  # experts a token, unless said otherwise
    metrics: tuple[str, ...] = ()  # that its class records among Megatron's

    @property
    def starts(self) -> tuple[str, ...]:
        """Fields of InitConfig that suit this kind and not every kind."""
        return self.own_starts + (("logit_scale", "target_entropy") if self.scaled else ())


def _linear_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    return (Parameter("weight", (options.num_experts, sizes.hidden_size), per_expert=True),)


# --- the paper's mixture of routers -------------------------------------------------------------------


def _mixture_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    assert options.num_routers is not None
    copies = options.num_experts // options.granularity
    shape = router_shape(sizes.num_attention_heads, sizes.kv_channels, options.num_routers, copies)
    m, width, n = shape.num_routers, shape.router_width, options.num_experts
    return (
        Parameter("query_weight", (m, width, sizes.hidden_size)),
        Parameter("expert_key", (n * shape.keys_per_expert, width), per_expert=True),
    )


def _mixture_settle(options: Options) -> dict[str, Any]:
    if options.num_routers is None:
        return {"num_routers": options.num_experts // options.granularity}
    return {}


def _mixture_gate(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    """[n*c, D], or [m*n*c, D] in max pooling; see ``fold``."""
    return {"weight": fold(values["query_weight"], values["expert_key"], options.pooling, dtype)}


def keys_per_expert(options: Options) -> int:
    """c = m / n, or 1 where there are fewer routers than experts."""
    assert options.num_routers is not None
    return max(1, options.num_routers * options.granularity // options.num_experts)


def mixture_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    return pool_logits(hidden @ gate["weight"].t(), options.num_experts, keys_per_expert(options))


def _mixture_not_stock(options: Options) -> str | None:
    assert options.num_routers is not None
    if options.pooling == "max" and options.num_routers > 1:
        return "takes the maximum over routers (--pooling max)"
    if (keys := keys_per_expert(options)) > 1:
        return f"takes the maximum over {keys} keys an expert"
    return None


# --- the paper's baselines (section 4.3) --------------------------------------------------------------


def _mlp_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    n, D = options.num_experts, sizes.hidden_size
    return Parameter("fc1.weight", (D, D)), Parameter("fc2.weight", (n, D), per_expert=True)


def _mlp_gate(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    return {"weight": values["fc2.weight"].to(dtype), "hidden.weight": values["fc1.weight"].to(dtype)}


def mlp_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    from torch.nn.functional import gelu

    return gelu(hidden @ gate["hidden.weight"].t()) @ gate["weight"].t()


def _switch_settle(options: Options) -> dict[str, Any]:
    if options.top_k != 1 or not options.pre_softmax:
        raise UserError(
            "--router switch: sends a token to one expert and weighs it by its softmax (Switch"
            " Transformer); give --top-k 1 and --moe-router-pre-softmax"
        )
    return {}


def _locmoe_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    if sizes.hidden_size % options.num_experts:
        raise UserError(
            f"--router locmoe: averages equal slices of the hidden state, one an expert, and"
            f" {options.num_experts} experts do not divide a hidden size of {sizes.hidden_size}; choose"
            " --num-experts that does"
        )
    return ()


def _locmoe_settle(options: Options) -> dict[str, Any]:
    if options.granularity > 1:
        raise UserError(
            f"--granularity {options.granularity}: --router locmoe has no keys for shards to share;"
            " leave it out"
        )
    if options.locality_loss_coeff is None:
        return {"locality_loss_coeff": LOCALITY_LOSS_COEFF}
    if not 0 <= options.locality_loss_coeff < math.inf:
        raise UserError(f"locality_loss_coeff {options.locality_loss_coeff}: must be 0 or more")
    return {}


def _locmoe_gate(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    """A constant matrix: row i averages the i-th of n equal slices of the hidden state."""
    import torch

    width = hidden_size // options.num_experts
    return {"weight": torch.eye(options.num_experts, dtype=dtype).repeat_interleave(width, dim=1) / width}


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "mixture",
            words="a router made of attention heads, in {router.num_routers} groups",
            card="a mixture of {router.num_routers} routers, {router.pooling} pooling, made from a dense"
            " model's attention heads (Router Upcycling, [arXiv 2509.00679](https://arxiv.org/abs/2509.00679))",
            parameters=_mixture_parameters,
            gate=_mixture_gate,
            logits=mixture_logits,
            helpers=(pool_logits, keys_per_expert),
            settle=_mixture_settle,
            not_stock=_mixture_not_stock,
            exported="as {rows} linear gates a layer, of which each expert takes the maximum",
            module="megatron_router_upcycling.routers.mixture:MixtureRouter",
            of_heads=True,
            options=("num_routers", "pooling", "grouping"),
            own_starts=("queries", "keys", "head_key"),
            scaled="expert_key",
            expert_keys="expert_key",
        ),
        Kind(
            "linear",
            words="a linear router",
            card="a linear layer",
            parameters=_linear_parameters,
            module=None,
            own_starts=("gate",),
            scaled="weight",
        ),
        Kind(
            "mlp",
            words="an MLP router",
            card="two layers with GELU between them",
            parameters=_mlp_parameters,
            gate=_mlp_gate,
            logits=mlp_logits,
            not_stock=lambda options: "has a hidden layer (--router mlp)",
            scaled="fc2.weight",
        ),
        Kind(
            "switch",
            words="a Switch router",
            card="Switch Transformer's, a linear layer (no token is dropped here)",
            parameters=_linear_parameters,
            settle=_switch_settle,
            module="megatron_router_upcycling.routers.baselines:SwitchRouter",
            own_starts=("gate",),
            scaled="weight",
            top_k=1,
            metrics=(DROPPED,),
        ),
        Kind(
            "locmoe",
            words="a LocMoE router",
            card="LocMoE's, the means of slices of the hidden state",
            parameters=_locmoe_parameters,
            gate=_locmoe_gate,
            settle=_locmoe_settle,
            module="megatron_router_upcycling.routers.baselines:LocMoERouter",
            has_bias=False,
            options=("locality_loss_coeff",),
            metrics=(LOCALITY, LOCAL),
        ),
    )
}


def get(name: str) -> Kind:
    """The row of a kind."""
    if name not in KINDS:
        raise UserError(f"--router {name}: choose one of {', '.join(KINDS)}")
    return KINDS[name]


def names_with(field: str) -> list[str]:
    """The kinds that have ``field`` of RouterConfig or InitConfig as one that not every kind has."""
    return [kind.name for kind in KINDS.values() if field in kind.options + kind.starts]


def all_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    """The parameters of one layer's router, Megatron's bias [n] at the end where it has one."""
    kind = get(options.router)
    own = kind.parameters(options, sizes)
    if not (kind.has_bias and sizes.add_bias_linear):
        return own
    return *own, Parameter("bias", (options.num_experts,), per_expert=True, constant=0.0)


def num_parameters(options: Options, sizes: Sizes) -> int:
    """Elements of one layer's router."""
    return sum(math.prod(parameter.shape) for parameter in all_parameters(options, sizes))


def gate_shapes(options: Options, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of what ``Kind.gate`` gives, found by folding parameters that have no values."""
    import torch

    kind = get(options.router)
    with torch.device("meta"):
        values = {p.name: torch.empty(p.shape) for p in kind.parameters(options, sizes)}
        gate = kind.gate(values, options, sizes.hidden_size, torch.float32)
    return {name: tuple(value.shape) for name, value in gate.items()}
