"""Parameters, memory, arithmetic and communication of a run, as formulas.

Parameters are exact, rank by rank. Memory of weights, gradients and optimizer states follows from them and is
exact but for padding; activations, communication and time are estimates, and each function says of what.

Symbols: D hidden size, H heads, G query groups, d head size, F FFN width, n experts, k experts a token,
V vocabulary, t tensor and e expert parallel size. Pure: imports neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.routers import kinds

PARTS = ("embedding", "attention", "ffn", "experts", "routers", "norms", "output layer")
GIB = 2**30


def router_parameters(router: RouterConfig, setup: Setup) -> int:
    """Of one layer's router, which every rank holds whole."""
    heads = setup.num_attention_heads, setup.head_dim
    return kinds.num_parameters(router, kinds.Sizes(setup.hidden_size, *heads, setup.add_bias_linear))


def parameters(setup: Setup, stage: int) -> dict[str, int]:
    """Parameters that one GPU of pipeline rank ``stage`` holds, by part (``PARTS``)."""
    s, t = setup, setup.tensor_model_parallel_size
    D, d, F = s.hidden_size, s.head_dim, s.ffn
    H, G = s.num_attention_heads, s.groups
    gated = 2 if s.swiglu else 1
    biases, norm = s.add_bias_linear, 1 if s.normalization == "RMSNorm" else 2
    last = stage == s.pipeline_model_parallel_size - 1
    layers = s.layers_of_stage(stage)
    moe = sum(s.has_experts()[layer] for layer in layers)
    dense = len(layers) - moe

    def ffn(width: int, shards: int) -> int:
        weights = (gated + 1) * width * D // shards
        return weights + (gated * width // shards + D if biases else 0)

    qkv = (H + 2 * G) * d
    attention = (qkv + H * d) * D // t
    attention += qkv // t if biases or s.add_qkv_bias else 0
    attention += D if biases else 0
    norms = norm * (2 * D + (2 * d if s.qk_layernorm else 0))
    counts = dict.fromkeys(PARTS, 0)
    counts["attention"] = len(layers) * attention
    counts["norms"] = len(layers) * norms + (norm * D if last else 0)
    counts["ffn"] = dense * ffn(F, t)
    if moe:
        assert s.num_experts is not None and s.router is not None
        local = s.num_experts // s.expert_model_parallel_size
        counts["experts"] = moe * local * ffn(s.expert_ffn, s.expert_tensor_size)
        counts["routers"] = moe * router_parameters(s.router, s)
        if shared := s.moe_shared_expert_intermediate_size:
            gate = D if s.moe_shared_expert_gate else 0
            counts["ffn"] += moe * (ffn(shared, t) + gate)
    embedding = s.vocabulary * D // t
    if stage == 0:
        counts["embedding"] = embedding
        if s.position_embedding_type == "learned_absolute":
            counts["embedding"] += (s.max_position_embeddings or s.sequence) * D
    tied_copy = stage > 0 and not s.untie_embeddings_and_output_weights
    if last and (s.untie_embeddings_and_output_weights or tied_copy):
        counts["output layer"] = embedding
    return counts


def total_and_active(setup: Setup) -> tuple[int, int]:
    """Parameters of the whole model, and of those what one token passes: k of n experts in each layer."""
    whole = _whole(setup)
    total = sum(whole.values())
    idle = 0
    if setup.num_experts:
        idle = whole["experts"] * (setup.num_experts - setup.moe_router_topk) // setup.num_experts
    return total, total - idle


def _whole(setup: Setup) -> dict[str, int]:
    """Parameters of the model on one GPU alone."""
    vocabulary = setup.vocabulary
    alone = replace(
        setup,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        padded_vocab_size=vocabulary,
    )
    return parameters(alone, 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def element_size(setup: Setup) -> int:
    return 2 if setup.bf16 or setup.fp16 else 4


def gradient_size(setup: Setup) -> int:
    """Bytes of a gradient as data parallelism reduces it: float32 but for --grad-reduce-in-bf16."""
    return 2 if setup.bf16 and setup.grad_reduce_in_bf16 else 4


def memory(setup: Setup, stage: int) -> Memory:
    """What one GPU of pipeline rank ``stage`` needs at the peak of a step, the end of a forward pass.

    Adam keeps two float32 moments and, beside 16-bit weights, a float32 copy. The distributed optimizer
    divides them over the ranks that hold the same parameters.
    """
    counts = parameters(setup, stage)
    experts = counts["experts"]
    others = sum(counts.values()) - experts
    states = 12 if element_size(setup) == 2 else 8
    sharded = setup.use_distributed_optimizer
    over_others = setup.data_parallel_size * setup.context_parallel_size if sharded else 1
    over_experts = setup.expert_data_parallel_size if sharded else 1
    last = stage == setup.pipeline_model_parallel_size - 1
    return Memory(
        weights=element_size(setup) * (others + experts),
        gradients=gradient_size(setup) * (others + experts),
        optimizer=states * (others / over_others + experts / over_experts),
        activations=activations(setup, stage),
        logits=logits(setup) if last else 0,
    )


def tokens_on_gpu(setup: Setup) -> int:
    """Tokens of a micro-batch on a context-parallel rank."""
    return setup.micro_batch * setup.sequence // setup.context_parallel_size


def logits(setup: Setup) -> float:
    """Bytes of the softmax in float32 that cross entropy keeps, and of the logits or their gradient."""
    elements = tokens_on_gpu(setup) * setup.vocabulary / setup.tensor_model_parallel_size
    return elements * (element_size(setup) + 4)


def activations(setup: Setup, stage: int, fused: bool = True) -> float:
    """Bytes that layers keep for the backward pass, of all micro-batches in flight (an estimate).

    Attention without a materialised score matrix (FlashAttention). A token is counted at k experts on this
    GPU whatever the expert parallel size, which holds where the load is even. ``fused``: norms and SwiGLU in
    one kernel each, as on a GPU; PyTorch's separate operators, as on the CPU, keep more.
    """
    layers = setup.layers_of_stage(stage)
    tokens, flying = tokens_on_gpu(setup), in_flight(setup, stage)
    full = [_layer_bytes(setup, layer, fused) for layer in layers]
    if setup.recompute_granularity == "full":
        inputs = setup.hidden_size * element_size(setup) / _sequence_shards(setup)
        each = setup.recompute_num_layers or 1
        if setup.recompute_method == "block":
            recomputed = min(each, len(layers))
            per_token = inputs * recomputed + sum(full[recomputed:])
            at_work = max(full, default=0)
        else:  # uniform: the inputs of chunks of ``each`` layers, one chunk at work
            per_token = inputs * -(-len(layers) // each)
            at_work = max(full, default=0) * each
        return tokens * (per_token * flying + at_work)
    return tokens * sum(full) * flying


def in_flight(setup: Setup, stage: int) -> float:
    """Micro-batches whose activations pipeline rank ``stage`` holds at once (1F1B, interleaved or not)."""
    P, chunks = setup.pipeline_model_parallel_size, setup.virtual_stages
    # Interleaved: of chunks, 2 (P - stage - 1) + (chunks - 1) P are warmed up, and one is at work.
    held = P + (P - 2 * stage - 1) / chunks if chunks > 1 else P - stage
    return min(held, setup.num_microbatches)


def _sequence_shards(setup: Setup) -> int:
    return setup.tensor_model_parallel_size if setup.sequence_parallel else 1


def _layer_bytes(setup: Setup, layer: int, fused: bool) -> float:
    """Bytes a token that one layer keeps: what its norms, products, attention and activation go back by."""
    s, t = setup, setup.tensor_model_parallel_size
    D, H, G, d, size = s.hidden_size, s.num_attention_heads, s.groups, s.head_dim, element_size(setup)
    selective = s.recompute_granularity == "selective" or s.recompute_activations
    skipped = set(s.recompute_modules or ["core_attn"]) if selective else set()
    # A fused norm keeps its input; separate operators its float32 copy and the normalised values.
    norm = size if fused else 8
    kept = 2 * D * norm / _sequence_shards(s)
    kept += 0 if "layernorm" in skipped else 2 * D * size / _sequence_shards(s)  # the norms' outputs
    kept += 0 if fused or not s.qk_layernorm else (H + G) * d * norm / t
    # QKV's output, queries and keys turned by the rotary embedding, and the context.
    kept += (3 * H + 3 * G) * d * size / t
    if s.has_experts()[layer]:
        if "moe" not in skipped:
            # Tensor-parallel ranks of an expert see each other's tokens; other ranks keep their own.
            k, width = s.moe_router_topk * s.expert_tensor_size / t, s.expert_ffn / s.expert_tensor_size
            kept += (
                k * (D + _ffn_elements(s, width, fused, weighted=True, redone="moe_act" in skipped)) * size
            )
        if (shared := s.moe_shared_expert_intermediate_size) and "shared_experts" not in skipped:
            kept += _ffn_elements(s, shared / t, fused) * size
    elif "mlp" not in skipped:
        kept += _ffn_elements(s, s.ffn / t, fused) * size
    return kept


def _ffn_elements(
    setup: Setup, width: float, fused: bool, weighted: bool = False, redone: bool = False
) -> float:
    """Elements a token kept between FC1 and FC2: FC1's output, and FC2's input unless it is ``redone``.

    Unfused SwiGLU keeps two more factors, and a third where the router's weight is multiplied in.
    """
    if redone:
        return 2 * width if setup.swiglu else width
    if not setup.swiglu:
        return 2 * width if fused or not weighted else 3 * width
    return (3 if fused else 6 if weighted else 5) * width


def flops_per_token(setup: Setup) -> float:
    """Floating-point operations of a training step a token: forward and twice that backward.

    Matrix products of the parameters that a token passes, and causal attention at half of the square, as
    Megatron counts them; recomputation is not counted.
    """
    s = setup
    D, H, G, d = s.hidden_size, s.num_attention_heads, s.groups, s.head_dim
    gated = 3 if s.swiglu else 2
    attention = 2 * D * (2 * H + 2 * G) * d + 2 * s.sequence * H * d
    forward = s.num_layers * attention + 2.0 * D * s.vocabulary
    for moe in s.has_experts():
        width = (
            s.moe_router_topk * s.expert_ffn + (s.moe_shared_expert_intermediate_size or 0) if moe else s.ffn
        )
        forward += 2 * gated * D * width
    return 3 * forward


@dataclass(frozen=True)
class Communication:
    """Bytes that one GPU sends in a step (an estimate: rings, even loads, tokens sent all to all).

    What context parallelism sends within attention is not counted.
    """

    data_parallel: float  # gradients reduced, and weights gathered
    expert_parallel: float  # tokens to their experts and back, forward and backward
    tensor_parallel: float
    pipeline_parallel: float


def communication(setup: Setup, stage: int) -> Communication:
    counts = parameters(setup, stage)
    experts = counts["experts"]
    others = sum(counts.values()) - experts
    # A reduce-scatter of gradients and an all-gather of weights, or an all-reduce of gradients.
    each = gradient_size(setup) + (
        setup.weight_gathers * element_size(setup)
        if setup.use_distributed_optimizer
        else gradient_size(setup)
    )
    over_others = setup.data_parallel_size * setup.context_parallel_size
    over_experts = setup.expert_data_parallel_size
    data = each * (others * (1 - 1 / over_others) + experts * (1 - 1 / over_experts))

    layers = setup.layers_of_stage(stage)
    moe = sum(setup.has_experts()[layer] for layer in layers)
    t, e, P = (
        setup.tensor_model_parallel_size,
        setup.expert_model_parallel_size,
        setup.pipeline_model_parallel_size,
    )
    hidden = tokens_on_gpu(setup) * setup.hidden_size * element_size(setup)  # of a micro-batch
    steps = setup.num_microbatches
    copies = setup.moe_router_topk * hidden / t  # of this rank's tokens, on their way to experts
    to_experts = 4 * copies * (1 - 1 / e) * moe * steps
    # With sequence parallelism five gathers or scatters for attention and for a dense or shared FFN each;
    # else two all-reduces each, of twice the volume. Experts' tokens are gathered and, in the router's
    # float32, scattered among the ranks that share an expert; the same backward.
    shared = moe if setup.moe_shared_expert_intermediate_size else 0
    times = (5 if setup.sequence_parallel else 4) * (2 * len(layers) - moe + shared)
    of_experts = (2 + 2 * 4 / element_size(setup)) * copies * (setup.expert_tensor_size - 1) * moe
    tensor = (times * hidden * (1 - 1 / t) + of_experts) * steps
    # Activations to the next stage and gradients to the one before, of every chunk but the model's ends.
    sends = 2 * setup.virtual_stages - (stage == P - 1) - (stage == 0) if P > 1 else 0
    pipeline = sends * hidden / _sequence_shards(setup) * steps
    return Communication(data, to_experts, tensor, pipeline)


class Plan:
    """All figures of a Setup that passed ``setup.check``."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @cached_property
    def stages(self) -> list[int]:
        """Pipeline ranks that differ: the first, one between, the last."""
        P = self.setup.pipeline_model_parallel_size
        return sorted({0, min(1, P - 1), P - 1})

    @cached_property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        P = range(self.setup.pipeline_model_parallel_size)
        return max(P, key=lambda stage: memory(self.setup, stage).total)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the whole run; 0 where its length is not given."""
        return self.setup.steps * self.setup.batch * self.setup.sequence

    def seconds(self, utilisation: float, peak_tflops: float, tokens: float) -> float:
        """Time to train on ``tokens`` at a share of the GPUs' peak."""
        rate = utilisation * peak_tflops * 1e12 * self.setup.world_size
        return tokens * flops_per_token(self.setup) / rate
