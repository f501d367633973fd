"""What llama.cpp makes of an export.

It does not read every entry of config.json: as of the version in docs/hugging_face.md, whether the chosen
experts' weights are renormalised depends on the class alone, and every layer must have experts.
"""

from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.hf.architecture import QwenModel

RENORMALISES = {"qwen2": False, "qwen3": True}


def fault(model: QwenModel, router: RouterConfig, shared_expert_width: int) -> str | None:
    """Why llama.cpp does not compute this model, which stock classes hold; None where it does."""
    name = f"{model.family.capitalize()}-MoE"
    if model.dense_layers:
        return f"llama.cpp does not load this model: it wants experts in every layer of {name}"
    if model.family == "qwen2" and not shared_expert_width:
        return f"llama.cpp does not load this model: it wants a shared expert in {name}"
    renormalises = RENORMALISES[model.family]
    if renormalises != router.pre_softmax or router.top_k == router.num_experts:
        return None
    order = "softmax, then top-k" if router.pre_softmax else "top-k, then softmax"
    return (
        f"llama.cpp computes another model: it {'always' if renormalises else 'never'} renormalises the"
        f" chosen experts' weights in {name}, and this one routes by {order}"
    )
