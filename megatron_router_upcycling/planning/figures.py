"""Parameters, memory, arithmetic, communication and time of a run, as formulas.

Parameters are exact for each rank, and so is the memory of weights, gradients and optimizer states except for
padding. Activations (with this package's kernels on a GPU), communication and time are estimates.

``setup`` must come from ``complete``; ``stage`` is a pipeline rank.

Symbols: D hidden size, H heads, G query groups, d head size, V vocabulary, t tensor parallel size.
"""

import math
from dataclasses import replace
from typing import Any

from megatron_router_upcycling.planning.setup import PARALLEL, Setup
from megatron_router_upcycling.routers import kinds

PARTS = ("embedding", "attention", "ffn", "experts", "routers", "norms", "output layer")
GIB = 2**30


def parameters(setup: Setup, stage: int) -> dict[str, int]:
    """Parameters that one GPU of ``stage`` holds, by part (``PARTS``)."""
    s, D, t = setup, setup.hidden_size, setup.tensor_model_parallel_size
    layers, moe = _layers(s, stage)
    norm = 1 if s.normalization == "RMSNorm" else 2
    norms = norm * (2 * D + (2 * s.kv_channels if s.qk_layernorm else 0))
    counts = dict.fromkeys(PARTS, 0)
    counts["attention"] = layers * _attention_parameters(s)
    counts["norms"] = layers * norms + (norm * D if s.is_last(stage) else 0)
    counts["ffn"] = (layers - moe) * _ffn_parameters(s, s.ffn_hidden_size, t)
    if moe and s.router:
        local = s.num_experts // s.expert_model_parallel_size
        expert = _ffn_parameters(s, s.moe_ffn_hidden_size, s.expert_tensor_parallel_size)
        counts["experts"] = moe * local * expert
        router = kinds.all_parameters(s.router, s, s.add_bias_linear)  # on every rank
        counts["routers"] = moe * sum(math.prod(parameter.shape) for parameter in router)
        if shared := s.moe_shared_expert_intermediate_size:
            gate = D if s.moe_shared_expert_gate else 0
            counts["ffn"] += moe * (_ffn_parameters(s, shared, t) + gate)
    embedding = s.padded_vocab_size * D // t
    if stage == 0:
        learned = s.position_embedding_type == "learned_absolute"
        counts["embedding"] = embedding + learned * (s.max_position_embeddings or s.seq_length) * D
    # A tied output layer is the embedding itself, or a copy of it if it is on another stage.
    if s.is_last(stage) and (s.untie_embeddings_and_output_weights or stage > 0):
        counts["output layer"] = embedding
    return counts


def _layers(s: Setup, stage: int) -> tuple[int, int]:
    """How many layers ``stage`` has, and how many of them have experts."""
    with_experts = [s.has_experts()[layer] for layer in s.layers_of_stage(stage)]
    return len(with_experts), sum(with_experts)


def _attention_parameters(s: Setup) -> int:
    D, H, t = s.hidden_size, s.num_attention_heads, s.tensor_model_parallel_size
    qkv = (H + 2 * s.num_query_groups) * s.kv_channels
    biases = qkv // t if s.add_bias_linear or s.add_qkv_bias else 0
    return (qkv + H * s.kv_channels) * D // t + biases + (D if s.add_bias_linear else 0)


def _ffn_parameters(s: Setup, width: int, shards: int) -> int:
    """Parameters on one GPU of an FFN of ``width``, cut into ``shards``; FC2's bias is replicated."""
    D, up = s.hidden_size, 2 if s.swiglu else 1
    biases = up * width // shards + D if s.add_bias_linear else 0
    return (up + 1) * width * D // shards + biases


def _experts_and_rest(setup: Setup, stage: int) -> tuple[int, int]:
    counts = parameters(setup, stage)
    return counts["experts"], sum(counts.values()) - counts["experts"]


def total_and_active(setup: Setup) -> tuple[int, int]:
    """Parameters of the whole model, and how many of them are active for a token."""
    alone: dict[str, Any] = dict.fromkeys(PARALLEL, 1) | {"expert_tensor_parallel_size": 1}
    alone |= {"decoder_first_pipeline_num_layers": 0, "decoder_last_pipeline_num_layers": 0}
    experts, others = _experts_and_rest(replace(setup, **alone), 0)
    idle = experts * (setup.num_experts - setup.moe_router_topk) // setup.num_experts if experts else 0
    return experts + others, experts + others - idle


def memory(setup: Setup, stage: int) -> dict[str, float]:
    """Bytes by kind that one GPU of ``stage`` holds at the peak of a step, the end of a forward pass.

    Adam keeps two float32 moments and, for 16-bit weights, a float32 copy. The distributed optimizer shards
    them over the ranks that hold the same parameters.
    """
    experts, others = _experts_and_rest(setup, stage)
    kept: float = others + experts
    if setup.use_distributed_optimizer:
        kept = others / setup.replicas + experts / setup.expert_replicas
    return {
        "weights": setup.element_size * (others + experts),
        "gradients": setup.gradient_size * (others + experts),
        "optimizer": (12 if setup.element_size == 2 else 8) * kept,
        "activations": activations(setup, stage),
        "logits": logits(setup) if setup.is_last(stage) else 0,
    }


def fullest(setup: Setup) -> int:
    """The pipeline rank that needs the most memory."""
    stages = range(setup.pipeline_model_parallel_size)
    return max(stages, key=lambda stage: sum(memory(setup, stage).values()))


def tokens_on_gpu(setup: Setup) -> int:
    """Tokens of a micro-batch on a context-parallel rank."""
    return setup.micro_batch_size * setup.seq_length // setup.context_parallel_size


def logits(setup: Setup) -> float:
    """Bytes that the output layer and cross entropy hold at the start of the backward pass.

    These are the logits, which their gradient replaces in place, and the gradient of the output layer's
    weights. Megatron's own cross entropy holds two float32 copies of the logits in addition.
    """
    columns = setup.padded_vocab_size / setup.tensor_model_parallel_size
    once = setup.cross_entropy_loss_fusion and setup.tensor_model_parallel_size == 1
    per_logit = setup.element_size + (0 if once else 8)
    return columns * (tokens_on_gpu(setup) * per_logit + setup.hidden_size * setup.element_size)


def activations(setup: Setup, stage: int, fused: bool = True) -> float:
    """Bytes that layers save for the backward pass, for all micro-batches in flight (an estimate).

    Assumes FlashAttention and an even load. ``fused``: norms and SwiGLU are one kernel each, as on a GPU;
    PyTorch's separate operators, as on the CPU, save more.
    """
    layers = setup.layers_of_stage(stage)
    tokens, flying = tokens_on_gpu(setup), in_flight(setup, stage)
    full = [_layer_bytes(setup, layer, fused) for layer in layers]
    hidden = setup.hidden_size * setup.element_size / setup.sequence_shards
    if setup.recompute_granularity != "full":
        final_norm = 2 * hidden if setup.is_last(stage) else 0
        return tokens * (sum(full) * flying + final_norm)
    each = setup.recompute_num_layers or 1
    if setup.recompute_method == "block":
        recomputed = min(each, len(layers))
        per_token = hidden * recomputed + sum(full[recomputed:])
        at_work = max(full, default=0)
    else:  # uniform: the inputs of chunks of ``each`` layers, one chunk at work
        per_token = hidden * -(-len(layers) // each)
        at_work = max(full, default=0) * each
    return tokens * (per_token * flying + at_work)


def in_flight(setup: Setup, stage: int) -> float:
    """Micro-batches whose activations ``stage`` holds at once (1F1B, interleaved or not)."""
    P, chunks = setup.pipeline_model_parallel_size, setup.num_virtual_stages_per_pipeline_rank
    # Interleaved: 2 (P - stage - 1) + (chunks - 1) P forward passes of chunks in the warm-up, and one more.
    held = P + (P - 2 * stage - 1) / chunks if chunks > 1 else P - stage
    return min(held, setup.num_microbatches)


def _layer_bytes(setup: Setup, layer: int, fused: bool) -> float:
    """Bytes a token that one layer saves for the backward pass of norms, products, attention, activation."""
    s, t, size = setup, setup.tensor_model_parallel_size, setup.element_size
    D, H, G, d = s.hidden_size, s.num_attention_heads, s.num_query_groups, s.kv_channels
    selective = s.recompute_granularity == "selective" or s.recompute_activations
    skipped = set(s.recompute_modules or ["core_attn"]) if selective else set()
    # A fused norm saves its input; separate operators save a float32 copy of it and the normalised values.
    norm = size if fused else 8
    kept = 2 * D * norm / s.sequence_shards
    kept += 0 if "layernorm" in skipped else 2 * D * size / s.sequence_shards  # the norms' outputs
    kept += 0 if fused or not s.qk_layernorm else (H + G) * d * norm / t
    # QKV's output, queries and keys after the rotary embedding, and the context.
    kept += (3 * H + 3 * G) * d * size / t
    kept += 4 * H / t  # attention's log-sum-exp of each row, in float32
    if not s.has_experts()[layer]:
        return kept + (0 if "mlp" in skipped else _ffn_elements(s, s.ffn_hidden_size / t, fused) * size)
    # Logits and probabilities in float32, the routing map; for each choice a probability and two indices.
    routing = s.num_experts * (4 + 4 + 1) + s.moe_router_topk * (4 + 4 + 4)
    return kept + _expert_elements(s, fused, skipped) * size + routing


def _expert_elements(s: Setup, fused: bool, skipped: set[str]) -> float:
    """Elements a token that a layer's experts save, including the shared expert."""
    kept, t, etp = 0.0, s.tensor_model_parallel_size, s.expert_tensor_parallel_size
    if "moe" not in skipped:
        # The tensor-parallel ranks of an expert gather each other's tokens.
        choices, width = s.moe_router_topk * etp / t, s.moe_ffn_hidden_size / etp
        inner = _ffn_elements(s, width, fused, weighted=True, redone="moe_act" in skipped)
        kept += choices * (s.hidden_size + inner)
    if (shared := s.moe_shared_expert_intermediate_size) and "shared_experts" not in skipped:
        kept += _ffn_elements(s, shared / t, fused)
    return kept


def _ffn_elements(
    setup: Setup, width: float, fused: bool, weighted: bool = False, redone: bool = False
) -> float:
    """Elements a token saved between FC1 and FC2: FC1's output, and FC2's input unless it is recomputed.

    Unfused SwiGLU saves two more factors, and a third if it is ``weighted`` by the router's weight.
    """
    if redone:
        return 2 * width if setup.swiglu else width
    if not setup.swiglu:
        return 2 * width if fused or not weighted else 3 * width
    return (3 if fused else 6 if weighted else 5) * width


def ffn_widths(s: Setup) -> int:
    """Widths of the FFNs and experts that process a token, summed over layers."""
    experts = s.moe_router_topk * s.moe_ffn_hidden_size + s.moe_shared_expert_intermediate_size
    return sum(experts if moe else s.ffn_hidden_size for moe in s.has_experts())


def flops_per_token(setup: Setup) -> float:
    """Floating-point operations a token in a training step: the forward pass, and twice that for backward.

    Causal attention counts half of the square, as in Megatron; recomputation is not counted.
    """
    s, D = setup, setup.hidden_size
    H, G, d = s.num_attention_heads, s.num_query_groups, s.kv_channels
    attention = 2 * D * (2 * H + 2 * G) * d + 2 * s.seq_length * H * d
    ffns = 2 * (3 if s.swiglu else 2) * D * ffn_widths(s)
    return 3 * (s.num_layers * attention + 2.0 * D * s.padded_vocab_size + ffns)


def communication(setup: Setup, stage: int) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by kind (estimates for ring collectives, even load, all-to-all).

    Communication of context parallelism within attention is not counted.
    """
    s, (layers, moe) = setup, _layers(setup, stage)
    hidden = tokens_on_gpu(s) * s.hidden_size * s.element_size  # of a micro-batch
    # Hidden states of this rank's tokens, one copy for each chosen expert.
    copies = s.moe_router_topk * hidden / s.tensor_model_parallel_size
    to_experts = 4 * copies * (1 - 1 / s.expert_model_parallel_size) * moe
    # Each chunk sends activations to the next stage and gradients to the previous one, if there is one.
    sends = 0
    if s.pipeline_model_parallel_size > 1:
        sends = 2 * s.num_virtual_stages_per_pipeline_rank - s.is_last(stage) - (stage == 0)
    return {
        "data_parallel": _sent_by_data_parallelism(s, stage),
        "expert_parallel": to_experts * s.num_microbatches,
        "tensor_parallel": _sent_by_tensor_parallelism(s, layers, moe, hidden, copies) * s.num_microbatches,
        "pipeline_parallel": sends * hidden / s.sequence_shards * s.num_microbatches,
    }


def _sent_by_data_parallelism(setup: Setup, stage: int) -> float:
    """Bytes in a step: reduce-scatter of gradients and all-gather of weights, or all-reduce of gradients."""
    experts, others = _experts_and_rest(setup, stage)
    back = setup.gradient_size
    if setup.use_distributed_optimizer:
        back = setup.weight_gathers * setup.element_size
    ring = others * (1 - 1 / setup.replicas) + experts * (1 - 1 / setup.expert_replicas)
    return (setup.gradient_size + back) * ring


def _sent_by_tensor_parallelism(s: Setup, layers: int, moe: int, hidden: float, copies: float) -> float:
    """Bytes for one micro-batch of a stage with ``layers``, of which ``moe`` have experts.

    Attention and a dense or shared FFN take five gathers or scatters each, or two all-reduces of twice the
    volume without sequence parallelism. Experts' tokens are gathered and, in float32, scattered, both twice.
    """
    shared = moe if s.moe_shared_expert_intermediate_size else 0
    times = (5 if s.sequence_parallel else 4) * (2 * layers - moe + shared)
    of_experts = (2 + 2 * 4 / s.element_size) * copies * (s.expert_tensor_parallel_size - 1) * moe
    return times * hidden * (1 - 1 / s.tensor_model_parallel_size) + of_experts


# Time is scaled from a measured step, part by part: Qwen1.5-0.5B as 8x0.5B with the mixture of routers, one
# rank of 64, one micro-batch of 4 x 4096 tokens, on one NVIDIA H200, without Transformer Engine and without
# communication (docs/performance.md has hardware, versions and command).
MEASURED_ON = "one rank of an H200"
PEAK_TFLOPS = 989  # bfloat16, dense, of an H100 and an H200
TOKENS, LAYERS, D, F, V = 4 * 4096, 24, 1024, 2816, 151936
# Part -> ms of its kernels, and what they scale with: arithmetic, hidden states read, or parameters.
MEASURED = {
    "experts": (65.8, TOKENS * LAYERS * D * 2 * F),
    "attention": (30.6, TOKENS * 4096 * LAYERS * D),
    "projections": (15.8, TOKENS * LAYERS * 4 * D * D),
    "head and loss": (22.4, TOKENS * D * V),
    "gradients and optimizer": (10.2, 2_098_086_912),
    "routers and dispatch": (4.6 + 3.1, TOKENS * D * LAYERS),
    "norms, rotary, residuals": (3.9 + 1.8 + 5.3 + 0.6, TOKENS * D * LAYERS),  # and the embedding
}
# Wall time of a step over the time of those kernels: in CUDA graphs; eager, where the host launches them in
# time (micro-batches of 8) or not (4).
IN_GRAPHS = {"in CUDA graphs": 177.2 / 164.0}
EAGER = {"host keeps up": 339.8 / 314.7, "host falls behind": 219.4 / 164.0}


def kernel_ms(s: Setup) -> dict[str, float]:
    """Milliseconds of kernels for a micro-batch on one GPU, by part; the work is even over stages."""
    H, G, d = s.num_attention_heads, s.num_query_groups, s.kv_channels
    tokens = tokens_on_gpu(s) / (s.tensor_model_parallel_size * s.pipeline_model_parallel_size)
    states = tokens * s.hidden_size
    work = {
        "experts": states * ffn_widths(s) * (3 if s.swiglu else 2) / 3,
        "attention": tokens * s.seq_length * s.num_layers * H * d,
        "projections": states * s.num_layers * (2 * H + 2 * G) * d,
        "head and loss": states * s.padded_vocab_size,
        "gradients and optimizer": sum(parameters(s, fullest(s)).values()),
        "routers and dispatch": states * sum(s.has_experts()),
        "norms, rotary, residuals": states * s.num_layers,
    }
    return {part: ms * work[part] / measured for part, (ms, measured) in MEASURED.items()}


def step_seconds(setup: Setup, peak_tflops: float) -> dict[str, float]:
    """Seconds of a step by how its kernels are launched, if speed scales with ``peak_tflops``; without
    communication and recomputation."""
    kernels = sum(kernel_ms(setup).values()) / 1e3 * setup.num_microbatches * PEAK_TFLOPS / peak_tflops
    return {name: kernels * ratio for name, ratio in (IN_GRAPHS if setup.in_graphs else EAGER).items()}
