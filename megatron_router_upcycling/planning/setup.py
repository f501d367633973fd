"""The input of a plan: Megatron's arguments that decide the size of a run, and checks of their values."""

from dataclasses import dataclass, replace

from megatron_router_upcycling import expert_layers
from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training.cuda_graphs import KNOWN


@dataclass(frozen=True)
class Setup:
    """Megatron's arguments by their own names and with its own defaults, and the router to build.

    0 and "" mean that a value is not given; ``complete`` fills it in. ``world_size`` is the number of GPUs.
    Numbers of layers, heads etc. are those of the whole model.
    """

    world_size: int = 1
    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    group_query_attention: bool = False
    num_query_groups: int = 1
    kv_channels: int = 0
    swiglu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    normalization: str = "LayerNorm"
    position_embedding_type: str = "learned_absolute"
    max_position_embeddings: int = 0
    untie_embeddings_and_output_weights: bool = False
    vocab_size: int = 0
    padded_vocab_size: int = 0
    make_vocab_size_divisible_by: int = 128
    num_experts: int = 0
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int = 0
    moe_layer_freq: int | list[int] = 1
    moe_shared_expert_intermediate_size: int = 0
    moe_shared_expert_gate: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 0
    num_layers_per_virtual_pipeline_stage: int = 0
    num_virtual_stages_per_pipeline_rank: int = 1
    decoder_first_pipeline_num_layers: int = 0
    decoder_last_pipeline_num_layers: int = 0
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    bf16: bool = False
    fp16: bool = False
    grad_reduce_in_bf16: bool = False
    cross_entropy_loss_fusion: bool = False
    seq_length: int = 0
    micro_batch_size: int = 0
    global_batch_size: int = 0
    train_iters: int = 0
    train_samples: int = 0
    recompute_activations: bool = False
    recompute_granularity: str = ""
    recompute_method: str = ""
    recompute_num_layers: int = 0
    recompute_modules: tuple[str, ...] = ()
    cuda_graph_impl: str = ""
    router: RouterConfig | None = None

    @property
    def model_parallel_size(self) -> int:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return tp * pp * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters (not counting experts)."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks over which a layer's experts are spread."""
        return self.expert_model_parallel_size * self.expert_tensor_parallel_size

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.expert_ranks * self.pipeline_model_parallel_size)

    @property
    def weight_gathers(self) -> int:
        """How often a step gathers all weights: with expert parallelism Megatron has two optimizers, and each
        does unless that overlaps with the forward pass (seen in rehearsals of 0.19)."""
        return 2 if self.expert_model_parallel_size > 1 and not self.overlap_param_gather else 1

    @property
    def sequence_shards(self) -> int:
        """Parts that sequence parallelism cuts hidden states into."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    @property
    def element_size(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 or self.fp16 else 4

    @property
    def gradient_size(self) -> int:
        """Bytes of a gradient in data parallelism: float32, unless --grad-reduce-in-bf16 is given."""
        return 2 if self.bf16 and self.grad_reduce_in_bf16 else 4

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def in_graphs(self) -> bool:
        """Whether whole layers are captured on a GPU without Transformer Engine, by what is known here."""
        if self.cuda_graph_impl == "none" or not self.num_experts or self.expert_model_parallel_size > 1:
            return False
        values = {name: getattr(self, name) for name in KNOWN if hasattr(self, name)}
        return all(
            value in KNOWN[name] or (not value and None in KNOWN[name]) for name, value in values.items()
        )

    def is_last(self, stage: int) -> bool:
        return stage == self.pipeline_model_parallel_size - 1

    def has_experts(self) -> list[bool]:
        """For each layer, whether it has experts (``moe_layer_freq``)."""
        if not self.num_experts:
            return [False] * self.num_layers
        return expert_layers.has_experts(self.moe_layer_freq, self.num_layers)

    def layers_of_stage(self, stage: int) -> list[int]:
        """The layers that pipeline rank ``stage`` holds, over all of its model chunks."""
        P, chunks = self.pipeline_model_parallel_size, self.num_virtual_stages_per_pipeline_rank
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        fixed, free = {0: first, P - 1: last}, P - bool(first) - bool(last)
        even = (self.num_layers - first - last) // free if free else 0
        each = [(fixed.get(rank) or even) // chunks for rank in range(P)]
        starts = [chunk * sum(each) + sum(each[:stage]) for chunk in range(chunks)]
        return [layer for start in starts for layer in range(start, start + each[stage])]


# Arguments that a plan needs, and parallel sizes, which are 1 on a single GPU.
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")
PARALLEL = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model")]
PARALLEL.append("num_virtual_stages_per_pipeline_rank")


def complete(setup: Setup) -> Setup:
    """``setup`` with the arguments that Megatron fills in. Raises UserError for the first invalid value."""
    names = (*NEEDED, *PARALLEL, "num_query_groups", "make_vocab_size_divisible_by")
    needed = {"--gpus": setup.world_size} | {flag_of(name): getattr(setup, name) for name in names}
    needed["--vocab-size"] = setup.vocab_size or setup.padded_vocab_size
    for flag, value in needed.items():
        if value < 1:
            raise UserError(
                f"{flag} {value}: must be at least 1; give it as a flag, in the YAML file or by --load MOE"
            )
    _check_multiple("--gpus", setup.world_size, "TP x PP x CP", setup.model_parallel_size)
    filled = _filled(setup)
    _check(filled)
    return filled


def _filled(s: Setup) -> Setup:
    """``s`` with the values that Megatron's ``validate_args`` fills in, and with the vocabulary padded."""
    ffn = s.ffn_hidden_size or (int(4 * s.hidden_size * 2 / 3 / 64) * 64 if s.swiglu else 4 * s.hidden_size)
    multiple = s.make_vocab_size_divisible_by * s.tensor_model_parallel_size
    batch = s.global_batch_size or s.micro_batch_size * s.data_parallel_size
    chunks = s.num_virtual_stages_per_pipeline_rank
    if s.num_layers_per_virtual_pipeline_stage:
        of_rank = s.num_layers // s.pipeline_model_parallel_size
        chunks = max(1, of_rank // s.num_layers_per_virtual_pipeline_stage)
    return replace(
        s,
        ffn_hidden_size=ffn,
        num_query_groups=s.num_query_groups if s.group_query_attention else s.num_attention_heads,
        kv_channels=s.kv_channels or s.hidden_size // s.num_attention_heads,
        padded_vocab_size=s.padded_vocab_size or -(-s.vocab_size // multiple) * multiple,
        moe_ffn_hidden_size=s.moe_ffn_hidden_size or ffn,
        expert_tensor_parallel_size=s.expert_tensor_parallel_size or s.tensor_model_parallel_size,
        num_virtual_stages_per_pipeline_rank=chunks,
        global_batch_size=batch,
        train_iters=s.train_samples // batch if s.train_samples else s.train_iters,
    )


def _check(s: Setup) -> None:
    """Refuse layouts that would otherwise fail only after the run has got its GPUs."""
    P, t, ep = s.pipeline_model_parallel_size, s.tensor_model_parallel_size, s.expert_model_parallel_size
    chunks, etp = s.num_virtual_stages_per_pipeline_rank, s.expert_tensor_parallel_size
    virtual, tensor = s.num_layers_per_virtual_pipeline_stage, "--tensor-model-parallel-size"
    for flag, size, count, what in (
        ("--expert-model-parallel-size", ep, s.num_experts or 1, "experts" if s.num_experts else "dense FFN"),
        ("--num-layers-per-virtual-pipeline-stage", virtual or 1, s.num_layers // P, "layers of a stage"),
        ("--num-query-groups", s.num_query_groups, s.num_attention_heads, "attention heads"),
        (tensor, t, s.num_query_groups, "query groups"),
        (tensor, t, s.ffn_hidden_size, "columns of the FFN"),
        (tensor, t, s.padded_vocab_size, "tokens of the vocabulary"),
        ("--expert-tensor-parallel-size", etp, s.moe_ffn_hidden_size, "columns of an expert's FFN"),
    ):
        if count % size:
            raise UserError(f"{flag} {size}: does not divide the {count} {what}; {_divisors(count)}")
    if sum(len(s.layers_of_stage(stage)) for stage in range(P)) != s.num_layers:
        raise UserError(
            f"--pipeline-model-parallel-size {P}: its stages and model chunks cannot share the {s.num_layers}"
            f" layers evenly; without uneven or virtual stages {_divisors(s.num_layers)}"
        )
    _check_multiple("--gpus", s.world_size, "expert TP x EP x PP", etp * ep * P)
    step = s.micro_batch_size * s.data_parallel_size * (P if chunks > 1 else 1)
    what = f"--micro-batch-size x data parallel size{' x pipeline stages' * (chunks > 1)}"
    _check_multiple("--global-batch-size", s.global_batch_size, what, step)
    c = s.context_parallel_size
    parts = (2 * c if c > 1 else 1) * s.sequence_shards
    _check_multiple("--seq-length", s.seq_length, "its parts under context and sequence parallelism", parts)
    if 0 < s.max_position_embeddings < s.seq_length:
        raise UserError(f"--seq-length: is more than --max-position-embeddings {s.max_position_embeddings}")
    if len(s.has_experts()) != s.num_layers:
        raise UserError(
            f"--moe-layer-freq: lists {len(s.has_experts())} layers; the model has {s.num_layers}"
        )
    if s.num_experts and t > 1 and not s.sequence_parallel:
        raise UserError(f"{tensor} {t}: with experts Megatron also needs --sequence-parallel; give that too")


def _check_multiple(flag: str, number: int, what: str, size: int) -> None:
    if number % size:
        low = number // size * size
        near = f"{low} or {low + size}" if low else str(size)
        raise UserError(f"{flag} {number}: is not divisible by {what} = {size}; {near} would be")


def _divisors(number: int) -> str:
    """The divisors of ``number`` up to 64, as advice in a message."""
    return f"use one of {', '.join(str(d) for d in range(1, min(number, 64) + 1) if number % d == 0)}"
