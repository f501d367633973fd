"""Whether the layers of a run on a GPU are captured in CUDA graphs, as ``--cuda-graph-impl local`` does.

A replay launches a layer's kernels at once and runs no Python. So whatever differs between two passes must be
in tensors, and an evaluation replays what was captured in training. With experts on several ranks a layer's
dispatcher waits for the host, which a graph cannot hold: there attention and router are captured alone
(layers/captured.py).
"""

from argparse import Namespace
from typing import Any

# Megatron argument -> its values with which graphs are known to work. What is not here has no part in layers.
KNOWN: dict[str, tuple[Any, ...]] = {
    "tensor_model_parallel_size": (1,),
    "pipeline_model_parallel_size": (1,),
    "context_parallel_size": (1,),
    "transformer_impl": ("local",),
    "cuda_graph_modules": ([],),
    "spec": (None,),
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph"), (False,)),
    # Only grouped products of bfloat16 SwiGLU never ask how many tokens an expert has (layers/experts.py).
    **dict.fromkeys(("moe_grouped_gemm", "bf16", "swiglu"), (True,)),
    **dict.fromkeys(("add_bias_linear", "moe_apply_probs_on_input"), (False,)),
    **dict.fromkeys(("glu_linear_offset", "cpu_offloading_num_layers"), (0.0,)),
    # These have shapes, counts or buffers that differ from pass to pass, or are for training alone.
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), (0.0,)),
    "moe_router_score_function": ("softmax",),
    "moe_router_load_balancing_type": ("aux_loss", ["aux_loss"], "none", ["none"]),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
    "moe_layer_freq": (1,),
    **dict.fromkeys(
        ("moe_router_enable_expert_bias", "moe_router_padding_for_quantization", "moe_enable_routing_replay"),
        (False,),
    ),
    **dict.fromkeys(("reset_attention_mask", "multi_latent_attention", "qk_clip"), (False,)),
    **dict.fromkeys(("use_megatron_fsdp", "use_torch_fsdp2", "log_max_attention_logit"), (False,)),
    **dict.fromkeys(("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"), (False,)),
    **dict.fromkeys(
        (
            *("activation_func_clamp_value", "recompute_granularity", "moe_input_jitter_eps", "fp8", "fp4"),
            *("moe_expert_capacity_factor", "moe_shared_expert_intermediate_size", "moe_latent_size"),
            *("moe_router_num_groups", "moe_router_group_topk", "mtp_num_layers", "rampup_batch_size"),
            *("cuda_graph_scope_deprecated", "window_size", "save_activations_interval"),
            *("save_dgrads_interval", "save_tokens_per_expert_interval"),
        ),
        (None,),
    ),
}


def why_not(args: Namespace) -> str | None:
    """The first argument with which graphs are not known to work; None where the layers can be captured."""
    known = KNOWN | {"eval_micro_batch_size": (None, args.micro_batch_size)}
    values = {"num_experts": args.num_experts} if not args.num_experts else {}
    values |= {name: value for name in known if (value := getattr(args, name)) not in known[name]}
    return next((f"{name}={value}" for name, value in values.items()), None)
