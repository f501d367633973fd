"""What llama.cpp and mbridge make of an export.

They do not read every entry of config.json: as of the versions in docs/hugging_face.md, whether the chosen
experts' weights are renormalised depends on the class alone, and in llama.cpp every layer must have experts.
"""

from megatron_router_upcycling.hf.architecture import QwenModel
from megatron_router_upcycling.routers.config import RouterConfig

RENORMALISES = {"qwen2": False, "qwen3": True}


def fault(model: QwenModel, router: RouterConfig, shared_expert_width: int) -> str | None:
    """Why llama.cpp does not compute this model, which stock classes hold; None where it does."""
    name = f"{model.family.capitalize()}-MoE"
    if model.dense_layers:
        return f"llama.cpp does not load this model: it wants experts in every layer of {name}"
    if model.family == "qwen2" and not shared_expert_width:
        return f"llama.cpp does not load this model: it wants a shared expert in {name}"
    return _other_order("llama.cpp", model, router)


def mbridge_fault(model: QwenModel, router: RouterConfig) -> str | None:
    """The same for mbridge, which has no gate of the shared expert either."""
    if model.family == "qwen2" and model.shared_expert_size:
        return "mbridge computes another model: it leaves out the gate of Qwen2-MoE's shared expert"
    if model.dense_layers:
        return "mbridge does not load this model: it wants experts in every layer"
    return _other_order("mbridge", model, router)


def _other_order(tool: str, model: QwenModel, router: RouterConfig) -> str | None:
    renormalises = RENORMALISES[model.family]
    if renormalises != router.pre_softmax or router.top_k == router.num_experts:
        return None
    order = "softmax, then top-k" if router.pre_softmax else "top-k, then softmax"
    return (
        f"{tool} computes another model: it {'always' if renormalises else 'never'} renormalises the"
        f" chosen experts' weights in {model.family.capitalize()}-MoE, and this one routes by {order}"
    )
