"""What a plan is made of: Megatron's arguments that say how large a run is, and what cannot work in them.

Pure: imports neither torch nor Megatron.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_router_upcycling import expert_layers
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig


@dataclass(frozen=True)
class Setup:
    """Megatron's arguments by their own names and with its own defaults, and the router to build.

    ``world_size`` is the number of GPUs. Numbers of layers, heads and such are of the whole model.
    """

    world_size: int = 1
    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int | None = None
    num_attention_heads: int = 0
    group_query_attention: bool = False
    num_query_groups: int = 1
    kv_channels: int | None = None
    swiglu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    normalization: str = "LayerNorm"
    position_embedding_type: str = "learned_absolute"
    max_position_embeddings: int | None = None
    untie_embeddings_and_output_weights: bool = False
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    num_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    bf16: bool = False
    fp16: bool = False
    grad_reduce_in_bf16: bool = False
    cross_entropy_loss_fusion: bool = False
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    train_iters: int | None = None
    train_samples: int | None = None
    recompute_activations: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] | None = None
    router: RouterConfig | None = None

    @property
    def model_parallel_size(self) -> int:
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.model_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, experts aside."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks over which a layer's experts are spread."""
        return self.expert_model_parallel_size * self.expert_tensor_size

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.expert_ranks * self.pipeline_model_parallel_size)

    @property
    def weight_gathers(self) -> int:
        """How often the distributed optimizer gathers all weights in a step.

        With expert parallelism Megatron has two optimizers, for experts and for the rest. Unless gathering
        overlaps with the forward pass, each of them gathers everything (seen in rehearsals of 0.19).
        """
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
        """Bytes of a gradient as data parallelism reduces it: float32 but for --grad-reduce-in-bf16."""
        return 2 if self.bf16 and self.grad_reduce_in_bf16 else 4

    @property
    def num_microbatches(self) -> int:
        return self.batch // (self.micro_batch * self.data_parallel_size)

    @property
    def micro_batch(self) -> int:
        assert self.micro_batch_size
        return self.micro_batch_size

    @property
    def batch(self) -> int:
        """Sequences a step; Megatron's default is one micro-batch a rank."""
        return self.global_batch_size or self.micro_batch * self.data_parallel_size

    @property
    def sequence(self) -> int:
        assert self.seq_length
        return self.seq_length

    @property
    def steps(self) -> int:
        if self.train_samples:
            return self.train_samples // self.batch
        return self.train_iters or 0

    @property
    def groups(self) -> int:
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # As Megatron rounds it.
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def expert_ffn(self) -> int:
        return self.moe_ffn_hidden_size or self.ffn

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, padded as Megatron pads them."""
        if self.padded_vocab_size:
            return self.padded_vocab_size
        assert self.vocab_size
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def virtual_stages(self) -> int:
        """Model chunks on each pipeline rank."""
        if self.num_layers_per_virtual_pipeline_stage:
            per_rank = self.num_layers // self.pipeline_model_parallel_size
            return max(1, per_rank // self.num_layers_per_virtual_pipeline_stage)
        return self.num_virtual_stages_per_pipeline_rank or 1

    def is_last(self, stage: int) -> bool:
        return stage == self.pipeline_model_parallel_size - 1

    def has_experts(self) -> list[bool]:
        """For each layer, whether it has experts (``moe_layer_freq``)."""
        if self.num_experts is None:
            return [False] * self.num_layers
        return expert_layers.has_experts(self.moe_layer_freq, self.num_layers)

    def layers_of_stage(self, stage: int) -> list[int]:
        """The layers that pipeline rank ``stage`` holds, over all of its model chunks."""
        P, chunks = self.pipeline_model_parallel_size, self.virtual_stages
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        fixed = {0: first, P - 1: last}
        spread = self.num_layers - (first or 0) - (last or 0)
        free = P - (first is not None) - (last is not None)
        sizes = [fixed.get(rank) or (spread // free if free else 0) for rank in range(P)]
        each = [size // chunks for size in sizes]
        found: list[int] = []
        for chunk in range(chunks):
            start = chunk * sum(each) + sum(each[:stage])
            found += range(start, start + each[stage])
        return found


# What a plan cannot do without, but for the number of GPUs.
NEEDED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_query_groups",
)


def check(setup: Setup, gpus: str = "--gpus") -> None:
    """Raise UserError for the first thing that cannot work; it names a flag and what would work.

    Args:
        gpus: the flag that gave the number of GPUs.
    """
    # Each may count on those before it.
    checks = (_check_numbers, _check_gpus, _check_experts, _check_stages, _check_widths, _check_tokens)
    for problem in itertools.chain.from_iterable(check(setup, gpus) for check in checks):
        raise UserError(problem)


def flag_of(name: str) -> str:
    """The flag of one of Megatron's arguments."""
    return f"--{name.replace('_', '-')}"


def _check_numbers(s: Setup, gpus: str) -> Iterator[str]:
    if s.world_size < 1:
        yield f"{gpus} {s.world_size}: must be at least 1"
    for name in NEEDED:
        value = getattr(s, name)
        if not value:
            where = "in the YAML file, as a flag, or by --load CHECKPOINT"
            yield f"{flag_of(name)}: is missing or 0; give it {where}"
        elif value < 1:
            yield f"{flag_of(name)} {value}: must be at least 1"
    if s.vocab_size is None and s.padded_vocab_size is None:
        yield "--vocab-size: is not in the YAML file (it comes with the tokenizer); give the number of tokens"


def _check_gpus(s: Setup, gpus: str) -> Iterator[str]:
    if s.world_size % s.model_parallel_size:
        tp, pp, cp = s.tensor_model_parallel_size, s.pipeline_model_parallel_size, s.context_parallel_size
        yield (
            f"{gpus} {s.world_size}: is not divisible by --tensor-model-parallel-size {tp} x"
            f" --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = {s.model_parallel_size};"
            f" {_multiples(s.model_parallel_size, s.world_size)} would be"
        )


def _check_experts(s: Setup, gpus: str) -> Iterator[str]:
    n, ep = s.num_experts, s.expert_model_parallel_size
    flag = f"--expert-model-parallel-size {ep}"
    if n is None:
        if ep > 1:
            yield f"{flag}: the model has no experts; leave it out"
        return
    if n % ep:
        yield f"{flag}: does not divide the {n} experts; use one of {_divisors(n)}"
    needed = s.expert_ranks * s.pipeline_model_parallel_size
    if s.world_size % needed:
        yield (
            f"{flag}: {s.world_size} GPUs are not divisible by --expert-tensor-parallel-size"
            f" {s.expert_tensor_size} x EP {ep} x PP {s.pipeline_model_parallel_size} = {needed}"
        )


def _check_stages(s: Setup, gpus: str) -> Iterator[str]:
    pp, each = s.pipeline_model_parallel_size, s.num_layers_per_virtual_pipeline_stage
    if each and s.num_layers // pp % each:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {each}: does not divide the {s.num_layers // pp} layers"
            f" of a pipeline stage; use one of {_divisors(s.num_layers // pp)}"
        )
    if sum(len(s.layers_of_stage(stage)) for stage in range(pp)) != s.num_layers:
        what = f" x {s.virtual_stages} virtual stages" if s.virtual_stages > 1 else ""
        if s.decoder_first_pipeline_num_layers or s.decoder_last_pipeline_num_layers:
            what += " beside the uneven first and last stage"
        hint = "" if what else f"; use one of {_divisors(s.num_layers)}"
        yield f"--pipeline-model-parallel-size {pp}{what}: does not divide the {s.num_layers} layers{hint}"


def _check_widths(s: Setup, gpus: str) -> Iterator[str]:
    tp, etp = s.tensor_model_parallel_size, s.expert_tensor_size
    flag = f"--tensor-model-parallel-size {tp}"
    for count, name in ((s.num_attention_heads, "attention heads"), (s.groups, "query groups")):
        if count % tp:
            yield f"{flag}: does not divide the {count} {name}; use one of {_divisors(count)}"
    for width, name in ((s.ffn, "FFN's width"), (s.vocabulary, "vocabulary of")):
        if width % tp:
            yield f"{flag}: does not divide the {name} {width}"
    if s.num_experts is not None:
        if s.expert_ffn % etp:
            yield f"--expert-tensor-parallel-size {etp}: does not divide the experts' width {s.expert_ffn}"
        if len(s.has_experts()) != s.num_layers:
            yield f"--moe-layer-freq: lists {len(s.has_experts())} layers; the model has {s.num_layers}"
    if s.num_attention_heads % s.groups:
        yield f"--num-query-groups {s.groups}: does not divide the {s.num_attention_heads} attention heads"
    if s.num_experts is not None and tp > 1 and not s.sequence_parallel:
        yield f"{flag}: with experts Megatron needs --sequence-parallel beside it"


def _check_tokens(s: Setup, gpus: str) -> Iterator[str]:
    tp, pp, cp = s.tensor_model_parallel_size, s.pipeline_model_parallel_size, s.context_parallel_size
    step = s.micro_batch * s.data_parallel_size
    if s.batch % step:
        yield (
            f"--global-batch-size {s.batch}: is not divisible by --micro-batch-size {s.micro_batch} x data"
            f" parallel size {s.data_parallel_size} = {step}; {_multiples(step, s.batch)} would be"
        )
    if s.virtual_stages > 1 and s.num_microbatches % pp:
        yield (
            f"--global-batch-size {s.batch}: makes {s.num_microbatches} micro-batches, which virtual pipeline"
            f" stages need to be a multiple of --pipeline-model-parallel-size {pp}"
        )
    if s.max_position_embeddings is not None and s.max_position_embeddings < s.sequence:
        yield f"--seq-length {s.sequence}: is more than --max-position-embeddings {s.max_position_embeddings}"
    if s.sequence % ((2 * cp if cp > 1 else 1) * (tp if s.sequence_parallel else 1)):
        yield f"--seq-length {s.sequence}: is not divisible over context parallel {cp} x tensor parallel {tp}"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _multiples(of: int, near: int) -> str:
    low = near // of * of
    return " or ".join(str(value) for value in (low, low + of) if value)
