"""Whether what a conversion makes could be exported: asked before it is made and trained."""

from megatron_router_upcycling.conversion.convert import Conversion
from megatron_router_upcycling.conversion.moe_arguments import moe_common_state
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf.architecture import check_exportable


def check(conversion: Conversion) -> str | None:
    """Ask of the arguments that the new checkpoint will have what ``export-hf`` asks.

    Returns:
        A line for the user where the dense model is no Qwen, so that nothing of it has a class; else None.

    Raises:
        UserError: options take a Qwen where no class follows; says which flag converts it all the same.
    """
    plan = conversion.plan
    options = plan.options
    try:
        check_exportable(plan.dense.args, plan.model, plan.dense.root)
    except UserError as error:
        return f"not for Hugging Face: {error}"
    common = moe_common_state(plan.dense, plan.model, options.router, options.shared_expert, plan.layers)
    try:
        check_exportable(common["args"], plan.model, plan.dense.root)
    except UserError as error:
        raise UserError(
            f"DENSE {error}; to train a model that stays in Megatron, pass --allow-no-export"
        ) from None
    return None
