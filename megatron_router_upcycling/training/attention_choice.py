"""Which attention a run takes, decided before a layer is built, and what it costs where it is unfused."""

from argparse import Namespace

SDPA, MEGATRON, ENGINE = "sdpa", "megatron", "transformer engine"
LONG = 1024  # tokens of a sequence over which scores in memory are worth a line
GIB = 2**30


def choose(args: Namespace, with_te: bool) -> str:
    """``SDPA``, ``MEGATRON`` (its module that writes all scores to memory) or ``ENGINE``.

    ``--attention-backend`` decides where it is given: with Transformer Engine ``flash``, ``fused`` and
    ``unfused`` are its own kernels; without it the first two are what PyTorch chooses between, and the last
    is Megatron's module. ``local`` is that module, always.
    """
    backend = args.attention_backend.name
    if backend == "local" or (backend == "unfused" and not with_te):
        return MEGATRON
    if not with_te or (backend == "auto" and sdpa_covers(args)):
        return SDPA
    return ENGINE


def sdpa_covers(args: Namespace) -> bool:
    """Whether PyTorch's attention can do what the model needs.

    PyTorch chooses among cuDNN's, FlashAttention's and its own kernels, none of which holds the scores.
    Transformer Engine falls back to one that does where its own cannot be loaded, and says nothing.
    """
    return (
        args.context_parallel_size == 1
        and not getattr(args, "window_size", None)
        and not args.multi_latent_attention
        and not args.fp8
    )


def describe(args: Namespace, chosen: str) -> str:
    """The attention in use, for the line at the start of a run."""
    if chosen == SDPA:
        return "PyTorch's scaled_dot_product_attention"
    if chosen == MEGATRON:
        return "Megatron's, unfused"
    return f"Transformer Engine's ({args.attention_backend.name})"


def cost(args: Namespace, chosen: str) -> str | None:
    """What unfused attention costs at long sequences, in one line; None where there is none."""
    backend = args.attention_backend.name
    unfused = chosen == MEGATRON or (chosen == ENGINE and backend == "unfused")
    if not unfused or (args.seq_length or 0) <= LONG or not args.num_layers:
        return None
    heads = args.num_attention_heads / args.tensor_model_parallel_size
    size = 2 if args.bf16 or args.fp16 else 4
    layer = (args.micro_batch_size or 1) * heads * args.seq_length**2 * size
    layers = args.num_layers // args.pipeline_model_parallel_size
    return (
        f"--attention-backend {backend}: unfused attention keeps at least {layer / GIB:.1f} GiB of"
        f" scores a layer, {layers * layer / GIB:.1f} GiB in {layers} layers, and reads"
        " and writes them several times; without the flag none are kept"
    )
