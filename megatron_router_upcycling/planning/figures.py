"""Parameters, memory, arithmetic and communication of a run, as formulas.

Parameters are exact, rank by rank. Memory of weights, gradients and optimizer states follows from them and is
exact but for padding; activations, communication and time are estimates, and each function says of what.
Memory is that of this package's kernels on a GPU; time is what was measured there (``measured``), scaled.

Symbols: D hidden size, H heads, G query groups, d head size, F FFN width, n experts, k experts a token,
V vocabulary, t tensor and e expert parallel size. Pure: imports neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_router_upcycling.planning import measured
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig

PARTS = ("embedding", "attention", "ffn", "experts", "routers", "norms", "output layer")
GIB = 2**30


def router_parameters(router: RouterConfig, setup: Setup) -> int:
    """Of one layer's router, which every rank holds whole."""
    heads = setup.num_attention_heads, setup.head_dim
    return kinds.num_parameters(router, kinds.Sizes(setup.hidden_size, *heads, setup.add_bias_linear))


def parameters(setup: Setup, stage: int) -> dict[str, int]:
    """Parameters that one GPU of pipeline rank ``stage`` holds, by part (``PARTS``)."""
    s, D, layers = setup, setup.hidden_size, setup.layers_of_stage(stage)
    moe = sum(s.has_experts()[layer] for layer in layers)
    norm = 1 if s.normalization == "RMSNorm" else 2
    norms = norm * (2 * D + (2 * s.head_dim if s.qk_layernorm else 0))
    t = s.tensor_model_parallel_size
    counts = dict.fromkeys(PARTS, 0)
    counts["attention"] = len(layers) * _attention_parameters(s)
    counts["norms"] = len(layers) * norms + (norm * D if s.is_last(stage) else 0)
    counts["ffn"] = (len(layers) - moe) * _ffn_parameters(s, s.ffn, t)
    if moe:
        assert s.num_experts is not None and s.router is not None
        local = s.num_experts // s.expert_model_parallel_size
        counts["experts"] = moe * local * _ffn_parameters(s, s.expert_ffn, s.expert_tensor_size)
        counts["routers"] = moe * router_parameters(s.router, s)
        if shared := s.moe_shared_expert_intermediate_size:
            gate = D if s.moe_shared_expert_gate else 0
            counts["ffn"] += moe * (_ffn_parameters(s, shared, t) + gate)
    embedding = s.vocabulary * D // t
    if stage == 0:
        counts["embedding"] = embedding
        if s.position_embedding_type == "learned_absolute":
            counts["embedding"] += (s.max_position_embeddings or s.sequence) * D
    # A tied output layer is the embedding itself, or on another stage a copy of it.
    if s.is_last(stage) and (s.untie_embeddings_and_output_weights or stage > 0):
        counts["output layer"] = embedding
    return counts


def _attention_parameters(s: Setup) -> int:
    """Of one layer on one GPU."""
    D, H, G, d, t = s.hidden_size, s.num_attention_heads, s.groups, s.head_dim, s.tensor_model_parallel_size
    qkv = (H + 2 * G) * d
    count = (qkv + H * d) * D // t
    count += qkv // t if s.add_bias_linear or s.add_qkv_bias else 0
    return count + (D if s.add_bias_linear else 0)


def _ffn_parameters(s: Setup, width: int, shards: int) -> int:
    """Of an FFN of ``width`` cut into ``shards``, on one GPU; FC2's bias is whole on each."""
    D, up = s.hidden_size, 2 if s.swiglu else 1
    biases = up * width // shards + D if s.add_bias_linear else 0
    return (up + 1) * width * D // shards + biases


def _experts_and_rest(setup: Setup, stage: int) -> tuple[int, int]:
    """Parameters of experts, and all others, on one GPU."""
    counts = parameters(setup, stage)
    return counts["experts"], sum(counts.values()) - counts["experts"]


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
        padded_vocab_size=setup.vocabulary,
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


def memory(setup: Setup, stage: int) -> Memory:
    """What one GPU of pipeline rank ``stage`` needs at the peak of a step, the end of a forward pass.

    Adam keeps two float32 moments and, beside 16-bit weights, a float32 copy. The distributed optimizer
    divides them over the ranks that hold the same parameters.
    """
    experts, others = _experts_and_rest(setup, stage)
    states = 12 if setup.element_size == 2 else 8
    if setup.use_distributed_optimizer:
        kept = others / setup.replicas + experts / setup.expert_replicas
    else:
        kept = others + experts
    return Memory(
        weights=setup.element_size * (others + experts),
        gradients=setup.gradient_size * (others + experts),
        optimizer=states * kept,
        activations=activations(setup, stage),
        logits=logits(setup) if setup.is_last(stage) else 0,
    )


def tokens_on_gpu(setup: Setup) -> int:
    """Tokens of a micro-batch on a context-parallel rank."""
    return setup.micro_batch * setup.sequence // setup.context_parallel_size


def logits(setup: Setup) -> float:
    """Bytes that the output layer and cross entropy hold where the backward pass begins.

    Logits once, whose gradient takes their place, and the gradient of the output layer's weights. Megatron's
    own cross entropy, in use with tensor parallelism or without ``--cross-entropy-loss-fusion``, holds
    two float32 copies of the logits beside them.
    """
    columns = setup.vocabulary / setup.tensor_model_parallel_size
    once = setup.cross_entropy_loss_fusion and setup.tensor_model_parallel_size == 1
    per_logit = setup.element_size + (0 if once else 8)
    return columns * (tokens_on_gpu(setup) * per_logit + setup.hidden_size * setup.element_size)


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
        inputs = setup.hidden_size * setup.element_size / setup.sequence_shards
        each = setup.recompute_num_layers or 1
        if setup.recompute_method == "block":
            recomputed = min(each, len(layers))
            per_token = inputs * recomputed + sum(full[recomputed:])
            at_work = max(full, default=0)
        else:  # uniform: the inputs of chunks of ``each`` layers, one chunk at work
            per_token = inputs * -(-len(layers) // each)
            at_work = max(full, default=0) * each
        return tokens * (per_token * flying + at_work)
    final_norm = 2 * setup.hidden_size * setup.element_size / setup.sequence_shards
    ends = final_norm if setup.is_last(stage) else 0
    return tokens * (sum(full) * flying + ends)


def in_flight(setup: Setup, stage: int) -> float:
    """Micro-batches whose activations pipeline rank ``stage`` holds at once (1F1B, interleaved or not)."""
    P, chunks = setup.pipeline_model_parallel_size, setup.virtual_stages
    # Interleaved: of chunks, 2 (P - stage - 1) + (chunks - 1) P are warmed up, and one is at work.
    held = P + (P - 2 * stage - 1) / chunks if chunks > 1 else P - stage
    return min(held, setup.num_microbatches)


def _layer_bytes(setup: Setup, layer: int, fused: bool) -> float:
    """Bytes a token that one layer keeps: what its norms, products, attention and activation go back by."""
    s, t, size = setup, setup.tensor_model_parallel_size, setup.element_size
    D, H, G, d = s.hidden_size, s.num_attention_heads, s.groups, s.head_dim
    selective = s.recompute_granularity == "selective" or s.recompute_activations
    skipped = set(s.recompute_modules or ["core_attn"]) if selective else set()
    # A fused norm keeps its input; separate operators its float32 copy and the normalised values.
    norm = size if fused else 8
    kept = 2 * D * norm / s.sequence_shards
    kept += 0 if "layernorm" in skipped else 2 * D * size / s.sequence_shards  # the norms' outputs
    kept += 0 if fused or not s.qk_layernorm else (H + G) * d * norm / t
    # QKV's output, queries and keys turned by the rotary embedding, and the context.
    kept += (3 * H + 3 * G) * d * size / t
    kept += 4 * H / t  # attention's sum of each row
    if s.has_experts()[layer]:
        return kept + _expert_elements(s, fused, skipped) * size + _routing_bytes(s)
    return kept + (0 if "mlp" in skipped else _ffn_elements(s, s.ffn / t, fused) * size)


def _routing_bytes(s: Setup) -> float:
    """Bytes a token of a router and of the way to experts and back.

    Logits and probabilities in float32, which experts are chosen, a probability and two places a row.
    """
    return (s.num_experts or 0) * (4 + 4 + 1) + s.moe_router_topk * (4 + 4 + 4)


def _expert_elements(s: Setup, fused: bool, skipped: set[str]) -> float:
    """Elements a token that a layer's experts keep, the shared one among them."""
    kept, t = 0.0, s.tensor_model_parallel_size
    if "moe" not in skipped:
        # Tensor-parallel ranks of an expert see each other's tokens; other ranks keep their own.
        choices, width = s.moe_router_topk * s.expert_tensor_size / t, s.expert_ffn / s.expert_tensor_size
        inner = _ffn_elements(s, width, fused, weighted=True, redone="moe_act" in skipped)
        kept += choices * (s.hidden_size + inner)
    if (shared := s.moe_shared_expert_intermediate_size) and "shared_experts" not in skipped:
        kept += _ffn_elements(s, shared / t, fused)
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
    attention = 2 * D * (2 * H + 2 * G) * d + 2 * s.sequence * H * d
    experts = s.moe_router_topk * s.expert_ffn + (s.moe_shared_expert_intermediate_size or 0)
    width = sum(experts if moe else s.ffn for moe in s.has_experts())
    forward = s.num_layers * attention + 2.0 * D * s.vocabulary + 2 * (3 if s.swiglu else 2) * D * width
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
    layers = setup.layers_of_stage(stage)
    moe = sum(setup.has_experts()[layer] for layer in layers)
    hidden = tokens_on_gpu(setup) * setup.hidden_size * setup.element_size  # of a micro-batch
    # Hidden states of this rank's tokens, once for each of their experts.
    copies = setup.moe_router_topk * hidden / setup.tensor_model_parallel_size
    to_experts = 4 * copies * (1 - 1 / setup.expert_model_parallel_size) * moe
    # Activations to the next stage and gradients to the one before, of every chunk but the model's ends.
    sends = 0
    if setup.pipeline_model_parallel_size > 1:
        sends = 2 * setup.virtual_stages - setup.is_last(stage) - (stage == 0)
    steps = setup.num_microbatches
    return Communication(
        data_parallel=_sent_by_data_parallelism(setup, stage),
        expert_parallel=to_experts * steps,
        tensor_parallel=_sent_by_tensor_parallelism(setup, len(layers), moe, hidden, copies) * steps,
        pipeline_parallel=sends * hidden / setup.sequence_shards * steps,
    )


def _sent_by_data_parallelism(setup: Setup, stage: int) -> float:
    """In a step: gradients reduced and scattered, and weights gathered; or gradients reduced everywhere."""
    experts, others = _experts_and_rest(setup, stage)
    back = setup.gradient_size
    if setup.use_distributed_optimizer:
        back = setup.weight_gathers * setup.element_size
    ring = others * (1 - 1 / setup.replicas) + experts * (1 - 1 / setup.expert_replicas)
    return (setup.gradient_size + back) * ring


def _sent_by_tensor_parallelism(setup: Setup, layers: int, moe: int, hidden: float, copies: float) -> float:
    """For a micro-batch, by a stage of ``layers``, ``moe`` of them with experts.

    With sequence parallelism five gathers or scatters for attention and for a dense or shared FFN each; else
    two all-reduces each, of twice the volume. Experts' tokens are gathered and, in the router's float32,
    scattered among the ranks that share an expert; the same backward.
    """
    shared = moe if setup.moe_shared_expert_intermediate_size else 0
    times = (5 if setup.sequence_parallel else 4) * (2 * layers - moe + shared)
    of_experts = (2 + 2 * 4 / setup.element_size) * copies * (setup.expert_tensor_size - 1) * moe
    return times * hidden * (1 - 1 / setup.tensor_model_parallel_size) + of_experts


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

    def kernel_ms(self) -> dict[str, float]:
        """Milliseconds of kernels of a micro-batch on one GPU, by part: the measured ones, scaled.

        Parts of products grow with their arithmetic, others with the hidden states that they read, and
        gradients with the parameters. Work is taken to be even over pipeline stages.
        """
        s, m = self.setup, measured
        D, H, G, d = s.hidden_size, s.num_attention_heads, s.groups, s.head_dim
        cut = s.tensor_model_parallel_size * s.pipeline_model_parallel_size
        tokens = tokens_on_gpu(s) / cut
        k = s.moe_router_topk if s.num_experts else 0
        widths = [
            k * s.expert_ffn + (s.moe_shared_expert_intermediate_size or 0) if moe else s.ffn
            for moe in s.has_experts()
        ]
        own = sum(parameters(s, self.fullest).values())
        grows = {
            "experts": tokens * D * sum(widths) * (3 if s.swiglu else 2) / 3,
            "attention": tokens * s.sequence * s.num_layers * H * d,
            "projections": tokens * s.num_layers * D * (2 * H + 2 * G) * d,
            "head and loss": tokens * D * s.vocabulary,
            "gradients and optimizer": own,
            "routers and dispatch": tokens * D * sum(s.has_experts()),
            "norms, rotary, residuals": tokens * D * s.num_layers,
        }
        return {part: m.KERNEL_MS[part] * work / m.WORK[part] for part, work in grows.items()}

    def seconds(self, wall_over_kernels: float, peak_tflops: float, tokens: float) -> float:
        """Time to train on ``tokens``, on GPUs whose speed goes by their peak; communication is not in it."""
        steps = tokens / (self.setup.batch * self.setup.sequence)
        step = sum(self.kernel_ms().values()) / 1e3 * self.setup.num_microbatches
        return steps * step * wall_over_kernels * measured.PEAK_TFLOPS / peak_tflops

    def utilisation(self, wall_over_kernels: float) -> float:
        """Share of the GPUs' peak that ``seconds`` comes to."""
        step = self.setup.batch * self.setup.sequence
        taken = self.seconds(wall_over_kernels, measured.PEAK_TFLOPS, step) * self.setup.world_size
        return step * flops_per_token(self.setup) / (taken * measured.PEAK_TFLOPS * 1e12)
