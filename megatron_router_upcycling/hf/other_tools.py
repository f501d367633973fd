"""What other tools make of an export.

llama.cpp and mbridge do not read every entry of config.json: as of the versions in docs/hugging_face.md,
whether the chosen experts' weights are renormalised depends on the class alone, and every layer must have
experts.

transformers trains the export with the load balancing loss of config.json. Of one layer, n experts, k a
token, T tokens: f_i tokens chose expert i, P_i is the sum of their softmax. Megatron adds
c n / (k T^2) sum_i f_i P_i for every layer; transformers, only with ``output_router_logits``,
r n / (L T)^2 sum_i F_i Q_i once, where F and Q are sums of f and P over all L layers. With r = c L / k the
gradients by P_i, c n f_i / (k T^2) and r n F_i / (L T)^2, are equal where the layers' counts are
(F_i = L f_i), as in a single layer; elsewhere each layer's counts are replaced by their mean over the layers.

Pure: no torch.
"""

from argparse import Namespace
from typing import Any

from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.routers.config import RouterConfig

# Of a model whose experts have not trained yet, so that whoever trains it first balances their load: the c of
# the paper (section 4.1) and of configs/methods.
UNTRAINED = {"aux_loss": 0.02}
# Megatron's kinds of this loss: f_i counts a micro-batch, a sequence, or what came so far of a global batch.
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def balanced_by(args: Namespace) -> dict[str, float]:
    """Kind of loss in ``BALANCING`` -> its coefficient, of Megatron's arguments; only those above 0."""
    kinds = _listed(getattr(args, "moe_router_load_balancing_type", "aux_loss"))
    coefficients = _listed(getattr(args, "moe_aux_loss_coeff", 0.0))
    found: dict[str, float] = {}
    for kind, value in zip(kinds, coefficients, strict=False):
        if kind in BALANCING and isinstance(value, int | float) and value > 0:
            found[kind] = found.get(kind, 0.0) + float(value)
    return found


def loss_coefficient(trained: dict[str, float], num_layers: int, top_k: int) -> float:
    """``router_aux_loss_coef`` for ``num_layers`` layers with experts."""
    return sum(trained.values()) * num_layers / top_k


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def faults(model: QwenModel, router: RouterConfig, shared_expert_width: int) -> list[str]:
    """Why llama.cpp and mbridge do not compute this model, which stock classes hold; none where they do."""
    name, is_qwen2 = f"{model.family.capitalize()}-MoE", model.family == "qwen2"
    order = None
    if router.pre_softmax != is_qwen2 and router.top_k != router.num_experts:
        order = (
            f"computes another model: it {'never' if is_qwen2 else 'always'} renormalises the chosen experts'"
            f" weights in {name}, and this one routes by"
            f" {'softmax, then top-k' if router.pre_softmax else 'top-k, then softmax'}"
        )
    llama_cpp = mbridge = order
    if model.dense_layers:
        mbridge = "does not load this model: it wants experts in every layer"
        llama_cpp = f"{mbridge} of {name}"
    elif is_qwen2 and not shared_expert_width:
        llama_cpp = f"does not load this model: it wants a shared expert in {name}"
    if is_qwen2 and model.shared_expert_size:
        mbridge = "computes another model: it leaves out the gate of Qwen2-MoE's shared expert"
    return [f"{tool} {why}" for tool, why in (("llama.cpp", llama_cpp), ("mbridge", mbridge)) if why]
