"""Where a run takes place, and what must differ there: Megatron's flags and its attention.

A GPU without Transformer Engine, and the CPU, lack fused kernels that Megatron turns on by default; any GPU
lacks one without apex. ``adapt`` sets the flags and says so in one line.
"""

import importlib.util
from argparse import Namespace
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import cuda_graphs
from megatron_router_upcycling.training.patches import patching

# apex's extension that Megatron's output layer needs for --gradient-accumulation-fusion, on by default.
APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
# Megatron argument -> the value it must have without Transformer Engine and apex.
WITHOUT_FUSED_KERNELS: dict[str, Any] = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "tp_comm_overlap": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "fp8": None,
}
# Of --recompute-modules, what Megatron recomputes with Transformer Engine's help only.
RECOMPUTED_WITH_TE = {"layernorm", "mla_up_proj", "moe_act"}
# Megatron argument -> the value it must have on the CPU, beside those.
ON_CPU: dict[str, Any] = {
    "distributed_backend": "gloo",
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "num_workers": 0,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "ddp_average_in_collective": False,  # Gloo can sum, not average
    "cuda_graph_impl": "none",
    # The process that writes checkpoints is a fresh one, to which the bridge does not reach.
    "async_save": False,
    "use_persistent_ckpt_worker": False,
    "moe_grouped_gemm": False,
}
# Whose attention a run takes; MEGATRON's writes all scores to memory.
SDPA, ENGINE = "PyTorch's scaled_dot_product_attention", "Transformer Engine's"
MEGATRON = "Megatron's, unfused"


def choose(requested: str) -> str:
    """'cpu' or 'cuda' for ``--device auto|cpu|cuda``."""
    import torch

    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise UserError("--device cuda: no GPU is visible here; use --device cpu or --device auto")
    if requested == "cpu" and available:
        raise UserError("--device cpu: a GPU is visible here; hide it with CUDA_VISIBLE_DEVICES= (empty)")
    return "cuda" if available else "cpu"


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def use_built_dataset_helper() -> None:
    """Let Megatron take its wheel's compiled dataset helper; a source checkout has none, and builds it."""
    from megatron.core.datasets import utils

    patching.find("device", utils, "compile_helpers")
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        patching.replace("device", utils, "compile_helpers", lambda: None)


def check_implementation(transformer_impl: str | None) -> None:
    """Refuse the layers that Megatron has for generating text: their routers take no part in training."""
    if transformer_impl == "inference_optimized":
        raise UserError(
            "--transformer-impl inference_optimized: is for text generation, and trains no router; give"
            " --transformer-impl transformer_engine or local"
        )


def adapt(args: Namespace, device: str) -> str | None:
    """Set the flags that must differ on this platform; return one line that names those, or None."""
    check_implementation(getattr(args, "transformer_impl", None))
    undecided = args.cuda_graph_impl is None  # see ``launch``
    args.cuda_graph_impl = args.cuda_graph_impl or "none"
    needed: dict[str, Any] = {}
    if device == "cuda":
        if args.distributed_backend == "gloo":
            needed["ddp_average_in_collective"] = False
        if has_transformer_engine():
            with_apex = importlib.util.find_spec(APEX_EXTENSION)
            needed |= {} if with_apex else {"gradient_accumulation_fusion": False}
            platform = "GPU with Transformer Engine" if with_apex else "GPU without apex"
            return _set(args, needed, platform, _graphs(args, needed, undecided))
        needed = WITHOUT_FUSED_KERNELS | needed
    else:
        needed = WITHOUT_FUSED_KERNELS | ON_CPU
        if getattr(args, "use_megatron_fsdp", False):
            needed["gradient_reduce_div_fusion"] = False  # Gloo cannot divide while it sums
    if not args.reset_attention_mask:
        # Causal attention needs none, and PyTorch's fastest kernels take none.
        needed["create_attention_mask_in_dataloader"] = False
    modules = args.recompute_modules or ()
    if kept := [module for module in modules if module not in RECOMPUTED_WITH_TE]:
        needed["recompute_modules"] = kept
    elif modules:
        needed |= {"recompute_granularity": None, "recompute_modules": None}
    if device == "cpu":
        return _set(args, needed, "CPU over Gloo")
    note = ""
    if args.moe_grouped_gemm:
        from megatron_router_upcycling.layers import experts

        if why_not := experts.usable(device):
            needed["moe_grouped_gemm"] = False
            note = f"grouped expert products: {why_not}"
    return _set(args, needed, "GPU without Transformer Engine", note, _graphs(args, needed, undecided))


def _graphs(args: Namespace, needed: dict[str, Any], undecided: bool) -> str:
    """Add CUDA graphs to what is ``needed``, if the user left that open and they are known to work.

    Where a layer's dispatcher waits for the host, of its parts attention and router. Returns why not, or "".
    """
    run = Namespace(**vars(args) | needed)
    if undecided:
        if why_not := cuda_graphs.why_not(run):
            return f"no CUDA graphs, which are not known to work with {why_not}"
        run.cuda_graph_impl = needed["cuda_graph_impl"] = "local"
    if run.cuda_graph_impl == "local" and not run.cuda_graph_modules and run.num_experts:
        from megatron.core.transformer.enums import CudaGraphModule

        from megatron_router_upcycling.layers import dispatch

        cut = run.expert_tensor_parallel_size or run.tensor_model_parallel_size
        if not dispatch.covers(run, run.expert_model_parallel_size * cut):
            needed["cuda_graph_modules"] = [CudaGraphModule.attn, CudaGraphModule.moe_router]
    return ""


def _set(args: Namespace, needed: dict[str, Any], platform: str, *notes: str) -> str | None:
    changed = []
    for name, value in needed.items():
        if not hasattr(args, name):
            raise patching.changed("device", f"Megatron's argument {name!r} does not exist")
        if getattr(args, name) != value:
            setattr(args, name, value)
            words = [getattr(word, "name", word) for word in value] if isinstance(value, list) else value
            changed.append(f"{name}={words}")
    said = [f"set {', '.join(changed)}"] if changed else []
    return f"{platform}: {'; '.join([*said, *filter(None, notes)])}" if said or any(notes) else None


def choose_attention(args: Namespace, with_te: bool) -> str:
    """``SDPA``, ``MEGATRON`` or ``ENGINE``.

    ``--attention-backend`` decides where it is given: with Transformer Engine ``flash``, ``fused`` and
    ``unfused`` are its own kernels; without it the first two are PyTorch's, and the last is Megatron's.
    ``local`` is Megatron's, always. By default it is PyTorch's where that covers the model: none of its
    kernels holds the scores, and Transformer Engine silently falls back to one that does.
    """
    backend = args.attention_backend.name
    if backend == "local" or (backend == "unfused" and not with_te):
        return MEGATRON
    sdpa_covers = (
        args.context_parallel_size == 1
        and not getattr(args, "window_size", None)
        and not args.multi_latent_attention
        and not args.fp8
    )
    return SDPA if not with_te or (backend == "auto" and sdpa_covers) else ENGINE
