"""Every kind of router: one row of ``KINDS`` each, and the pure functions that the row names.

All code that depends on the kind reads its row, ``RouterConfig.kind``. To add a kind, add its row; it needs a
class (``Kind.module``) only where ``routers.base`` cannot train it from the row.

Pure: imports neither Megatron nor, before a function is called, torch.

Symbols: m routers, n experts, c keys an expert, d' router width, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.fold import fold, pool_logits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

type Values = dict[str, "Tensor"]
type Options = Any  # a RouterConfig, whose file imports this one
type Sizes = Any  # a model's description: has hidden_size, num_attention_heads and kv_channels

LOCALITY_LOSS_COEFF = 0.01
# Names among Megatron's MoE metrics.
DROPPED = "dropped token share"
LOCALITY = "locality_loss"
LOCAL = "local token share"


@dataclass(frozen=True)
class Parameter:
    """A parameter of one layer's router."""

    name: str  # behind ``decoder.layers.mlp.router.``
    shape: tuple[int, ...]
    per_expert: bool = False  # axis 0 counts experts: shards of one copy start equal
    constant: float | None = None  # initial value; None: N(0, init_method_std)


def _as_stored(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    return {name: value.to(dtype) for name, value in values.items()}


def linear_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    return hidden @ gate["weight"].t()


@dataclass(frozen=True)
class Kind:
    """One kind of router.

    - ``words``: in messages, after "experts and"; ``card``: in a model card, after "the router is". Both may
      name fields of ``router``, the options.
    - ``parameters``: of one layer, without Megatron's bias. Raises UserError where they do not fit the model.
    - ``gate``: (values, options, D, dtype) -> what logits are computed from and exports hold, one named
      ``weight``: the parameters folded as far as possible.
    - ``logits``: (gate, hidden states [..., D], options) -> [..., n]. It uses only fields of the options that
      ``RouterConfig.to_dict`` has, and nothing of its module but ``helpers``: the modelling file of an export
      that no stock class suits holds the source of both.
    - ``fill_in``: options -> values for those that were not given. Raises UserError for impossible options.
    - ``not_stock``: why a stock Mixture-of-Experts class of transformers does not compute these logits, or
      None: the gate is then one matrix [n, D]. ``exported``: how an export that is not stock stores the gate.
    """

    name: str
    words: str
    card: str
    parameters: Callable[[Options, Sizes], tuple[Parameter, ...]]
    gate: Callable[[Values, Options, int, "torch.dtype"], Values] = _as_stored
    logits: Callable[[Values, "Tensor", Options], "Tensor"] = linear_logits
    helpers: tuple[Callable[..., Any], ...] = ()
    fill_in: Callable[[Options], dict[str, Any]] = lambda options: {}
    not_stock: Callable[[Options], str | None] = lambda options: None
    exported: str = "as it is"
    # The class that trains it, MODULE:NAME, built with router=options; None: Megatron's own TopKRouter.
    module: str | None = "megatron_router_upcycling.routers.base:OwnParametersRouter"
    has_bias: bool = True  # where Megatron's linear layers have biases
    of_heads: bool = False  # initialised from attention heads and key statistics, not as in ``Parameter``
    options: tuple[str, ...] = ()  # fields of RouterConfig that only some kinds have
    own_starts: tuple[str, ...] = ()  # likewise, of InitConfig
    scaled: str | None = None  # the parameter that logits are proportional to
    expert_keys: str | None = None  # the parameter whose rows inspect compares by their cosine
    top_k: int = 2  # experts a token, by default
    metrics: tuple[str, ...] = ()  # that its class records among Megatron's

    @property
    def starts(self) -> tuple[str, ...]:
        """Fields of InitConfig that only some kinds have, this one among them."""
        return self.own_starts + (("target_entropy",) if self.scaled else ())

    def check_has(self, field: str, given: str) -> None:
        """Raise UserError, which begins with ``given``, where only other kinds have ``field``."""
        having = names_with(field)
        if having and self.name not in having:
            raise UserError(f"{given}: is for --router {' or '.join(having)}, not for {self.name}")


def _linear_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    return (Parameter("weight", (options.num_experts, sizes.hidden_size), per_expert=True),)


def _mixture_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    width = options.shape(sizes.num_attention_heads, sizes.kv_channels).router_width
    queries = Parameter("query_weight", (options.num_routers, width, sizes.hidden_size))
    keys = options.num_experts * keys_per_expert(options)
    return queries, Parameter("expert_key", (keys, width), per_expert=True)


def _mixture_gate(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    """[n*c, D], or [m*n*c, D] in max pooling; see ``fold``."""
    return {"weight": fold(values["query_weight"], values["expert_key"], options.pooling, dtype)}


def _mixture_fill_in(options: Options) -> dict[str, Any]:
    return {"num_routers": options.num_copies} if options.num_routers is None else {}


def keys_per_expert(options: Options) -> int:
    """c = m / n, or 1 where there are fewer routers than experts."""
    return max(1, options.num_routers * options.granularity // options.num_experts)


def mixture_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    return pool_logits(hidden @ gate["weight"].t(), options.num_experts, keys_per_expert(options))


def _mixture_not_stock(options: Options) -> str | None:
    if options.pooling == "max" and options.num_routers > 1:
        return "takes the maximum over routers (--pooling max)"
    if (keys := keys_per_expert(options)) > 1:
        return f"takes the maximum over {keys} keys an expert"
    return None


def _mlp_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    n, D = options.num_experts, sizes.hidden_size
    return Parameter("fc1.weight", (D, D)), Parameter("fc2.weight", (n, D), per_expert=True)


def _mlp_gate(values: Values, options: Options, hidden_size: int, dtype: "torch.dtype") -> Values:
    return {"weight": values["fc2.weight"].to(dtype), "hidden.weight": values["fc1.weight"].to(dtype)}


def mlp_logits(gate: Values, hidden: "Tensor", options: Options) -> "Tensor":
    from torch.nn.functional import gelu

    return gelu(hidden @ gate["hidden.weight"].t()) @ gate["weight"].t()


def _switch_fill_in(options: Options) -> dict[str, Any]:
    if options.top_k != 1 or not options.pre_softmax:
        raise UserError("--router switch: needs --top-k 1 and --moe-router-pre-softmax (Switch Transformer)")
    return {}


def _locmoe_parameters(options: Options, sizes: Sizes) -> tuple[Parameter, ...]:
    n, D = options.num_experts, sizes.hidden_size
    if D % n:
        raise UserError(f"--router locmoe: {n} experts do not divide a hidden size of {D}")
    return ()


def _locmoe_fill_in(options: Options) -> dict[str, Any]:
    granularity, coefficient = options.granularity, options.locality_loss_coeff
    if granularity > 1:
        raise UserError(f"--granularity {granularity}: --router locmoe has no keys to share; leave it out")
    if coefficient is None:
        return {"locality_loss_coeff": LOCALITY_LOSS_COEFF}
    if not 0 <= coefficient < math.inf:
        raise UserError(f"locality_loss_coeff {coefficient}: must be 0 or more")
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
            words="a mixture of {router.num_routers} routers from attention heads",
            card="a mixture of {router.num_routers} routers, {router.pooling} pooling, made from a dense"
            " model's attention heads (Router Upcycling, [arXiv 2509.00679](https://arxiv.org/abs/2509.00679))",
            parameters=_mixture_parameters,
            gate=_mixture_gate,
            logits=mixture_logits,
            helpers=(pool_logits, keys_per_expert),
            fill_in=_mixture_fill_in,
            not_stock=_mixture_not_stock,
            exported="as {rows} linear gates a layer, of which each expert takes the maximum",
            module="megatron_router_upcycling.routers.mixture:MixtureRouter",
            of_heads=True,
            options=("num_routers", "pooling"),
            own_starts=("queries", "keys", "head_key", "center", "equalize"),
            scaled="expert_key",
            expert_keys="expert_key",
        ),
        Kind(
            "linear",
            words="a linear router",
            card="a linear layer",
            parameters=_linear_parameters,
            module=None,
            own_starts=("gate", "head_key", "center", "equalize"),
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
            fill_in=_switch_fill_in,
            module="megatron_router_upcycling.routers.baselines:SwitchRouter",
            own_starts=("gate", "head_key", "center", "equalize"),
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
            fill_in=_locmoe_fill_in,
            module="megatron_router_upcycling.routers.baselines:LocMoERouter",
            has_bias=False,
            options=("locality_loss_coeff",),
            metrics=(LOCALITY, LOCAL),
        ),
    )
}


def get(name: str) -> Kind:
    if name not in KINDS:
        raise UserError(f"--router {name}: choose one of {', '.join(KINDS)}")
    return KINDS[name]


def names_with(field: str) -> list[str]:
    """The kinds that have ``field`` of RouterConfig or InitConfig, where not every kind has it."""
    return [kind.name for kind in KINDS.values() if field in kind.options + kind.starts]


def all_parameters(options: Options, sizes: Sizes, linear_bias: bool) -> tuple[Parameter, ...]:
    """The parameters of one layer's router, with a bias [n] where Megatron's linear layers have biases."""
    kind = get(options.router)
    bias = Parameter("bias", (options.num_experts,), per_expert=True, constant=0.0)
    return kind.parameters(options, sizes) + ((bias,) if linear_bias and kind.has_bias else ())


def gate_shapes(options: Options, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of what ``Kind.gate`` returns."""
    import torch

    kind = get(options.router)
    # One number a tensor: on the meta device, a division imports PyTorch's compiler.
    values = {p.name: torch.zeros(()).expand(p.shape) for p in kind.parameters(options, sizes)}
    gate = kind.gate(values, options, sizes.hidden_size, torch.float32)
    return {name: tuple(value.shape) for name, value in gate.items()}
