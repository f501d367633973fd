"""Run the dense model over its training data and average its key vectors (section 3.2)."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_router_upcycling.checkpoint import described
from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED, num_query_groups
from megatron_router_upcycling.checkpoint.names import holds_experts
from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.read_model import query_key_digest, read_model
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions
from megatron_router_upcycling.key_statistics import capture
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.moments import KeySums
from megatron_router_upcycling.training import launch, train
from megatron_router_upcycling.training.data import check_data, check_tokens


def collect(run: launch.Run) -> None:
    """Run the dense model over ``--collect-iters`` global batches and write ``--output``."""
    from megatron.core import parallel_state

    args = run.args
    check(run)
    model = load_model(args)
    sums = new_sums(args)
    ranks = {
        "dp": parallel_state.get_data_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "tp": parallel_state.get_tensor_model_parallel_rank(),
    }
    sample = capture.RouterInput(args, args.router_samples, ranks)
    data = train_iterators(args, len(model), args.collect_iters)
    batches = tqdm(
        range(args.collect_iters),
        desc="collecting keys",
        unit="token",
        unit_scale=args.global_batch_size * args.seq_length,
        disable=args.quiet or args.rank != 0 or None,
    )
    losses = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    with capture.capture_router_input(model, sample), capture.capture_keys(model, sums):
        for _ in batches:
            losses += forward(args, model, data)
    sums.all_reduce()
    inputs = sample.gather(args.num_layers) if sample.num_tokens else None
    torch.distributed.all_reduce(losses)
    if args.rank == 0:
        write(args, sums, inputs, losses)


def new_sums(args: Namespace) -> KeySums:
    sizes = args.num_layers, args.num_attention_heads, num_query_groups(args), args.kv_channels
    return KeySums(*sizes, torch.cuda.current_device())


def write(args: Namespace, sums: KeySums, inputs: torch.Tensor | None, losses: torch.Tensor) -> None:
    """Write ``--output`` from the merged sums, and print a summary."""
    metadata = provenance(args) | {"lm_loss": float(losses[0] / losses[1])}
    count = torch.full((args.num_layers,), sums.tokens)
    stats = key_stats_file.KeyStats(sums.mean(), count, sums.attended(), metadata, inputs)
    if not stats.mean.isfinite().all():
        raise UserError(f"--load {args.load}: the model's keys hold NaN or infinite values; train it again")
    key_stats_file.save(args.output, stats, args.overwrite)
    keys = f"keys of {args.num_layers} layers x {metadata['num_query_groups']} query groups"
    loss = f"LM loss of the dense model {metadata['lm_loss']:.4f}"
    print(f"{args.output}: {keys} over {sums.tokens} tokens; {loss}", flush=True)


def check(run: launch.Run) -> None:
    """Refuse what does not fit the checkpoint or the data, before anything is built."""
    args = run.args
    dense = open_dense(args.load)
    saved_args = dense.common.get("args")
    if run.router or holds_experts(dense.tensors) or getattr(saved_args, "num_experts", None):
        raise UserError(
            f"--load {args.load}, --num-experts {args.num_experts}: keys are collected from a dense model;"
            " name the checkpoint that the Mixture-of-Experts is made from, and its configuration"
        )
    if not described.gives_architecture(saved_args):
        dense = open_dense(args.load, args.config and Path(args.config))
        read_model(dense)
    check_architecture(args, dense.args)
    check_data(args)
    check_tokens(args, args.load)


def check_architecture(args: Namespace, trained: Namespace) -> None:
    """Refuse an architecture that differs from the ``trained`` one, and too much tensor parallelism."""
    groups, size = num_query_groups(args), args.tensor_model_parallel_size
    names = (ARCHITECTURE | NEGATED).values()
    compared = {name: (getattr(args, name, None), getattr(trained, name, None)) for name in names}
    compared["num_query_groups"] = (groups, num_query_groups(trained))
    for name, (asked, found) in compared.items():
        if asked != found and hasattr(trained, name):
            raise UserError(
                f"--config {args.config}: {name} {asked}, but the checkpoint {args.load} was trained with"
                f" {found}; use the configuration of its training"
            )
    if groups < size:
        raise UserError(f"--tensor-model-parallel-size {size}: use at most {groups}, the query groups")


def load_model(args: Namespace) -> list[torch.nn.Module]:
    """This rank's chunks of the dense model in ``--load``, in evaluation mode."""
    from megatron.training.argument_utils import gpt_config_from_args

    args.skip_train = True  # neither an optimizer nor gradient buffers
    args.finetune = True  # weights alone, and the data from its beginning
    args.no_load_optim = args.no_load_rng = True
    args.exit_on_missing_checkpoint = True
    args.rerun_mode = "disabled"  # as in Megatron's own evaluation
    model, _, _ = train.build(args, gpt_config_from_args(args))
    for chunk in model:
        chunk.eval()
    return model


def train_iterators(args: Namespace, num_chunks: int, iterations: int) -> Any:
    """An iterator over ``iterations`` global batches of the training data, as in Megatron's training loop.

    With virtual pipeline parallelism, a list with one iterator for each model chunk.
    """
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_router_upcycling.training.language_model import datasets_provider

    args.skip_train = False  # Megatron reads no training data with it
    args.train_iters, args.train_samples = iterations, None
    args.eval_iters, args.eval_interval = 1, iterations  # Megatron cannot build a blend of no samples
    is_virtual = args.virtual_pipeline_model_parallel_size is not None
    iterators: list[Iterator | None] = []
    for vp_stage in range(num_chunks) if is_virtual else (None,):
        provider = partial(datasets_provider, vp_stage=vp_stage)
        provider.is_distributed = True  # type: ignore[attr-defined]
        iterators.append(build_train_valid_test_data_iterators(provider)[0])
    if not args.do_train:
        raise UserError(f"--split {args.split}: leaves no training data to run over")
    return iterators if is_virtual else iterators[0]


def forward(args: Namespace, model: list[torch.nn.Module], data: Any) -> torch.Tensor:
    """Run one global batch forward: this rank's sum of token losses and their number, float64 [2]; zeros
    where it does not hold the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_router_upcycling.training.language_model import forward_step

    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=True,
        )
    zeros = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    return sum((report["lm loss"] for report in reports), zeros)


def provenance(args: Namespace) -> dict[str, Any]:
    """The model, data and run that the statistics come from, as JSON values."""
    from megatron.training.utils import get_blend_and_blend_per_split

    dense = open_dense(args.load)
    blend, per_split = get_blend_and_blend_per_split(args)
    blend = per_split[0] if per_split else blend
    recorded = (
        "num_layers kv_channels num_attention_heads hidden_size seq_length global_batch_size"
        " micro_batch_size split seed config tensor_model_parallel_size pipeline_model_parallel_size"
        " context_parallel_size data_parallel_size"
    )
    return {
        "key_source": key_stats_file.KEY_SOURCE,
        **{name: getattr(args, name) for name in recorded.split()},
        "num_query_groups": num_query_groups(args),
        "checkpoint": str(Path(args.load).absolute()),
        "checkpoint_digest": dense.digest(),
        "query_key_digest": query_key_digest(dense),
        "data": list(blend[0]) if blend else "mock",
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "iterations": args.collect_iters,
        "tokens": args.collect_iters * args.global_batch_size * args.seq_length,
        "versions": versions(),
    }
