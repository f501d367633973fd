"""Run the dense model over its training data and average its key vectors (section 3.2)."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_router_upcycling.checkpoint import described
from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED
from megatron_router_upcycling.checkpoint.names import holds_experts
from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.read_model import query_key_digest, read_model
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import versions
from megatron_router_upcycling.key_statistics import capture, router_sample
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.key_statistics.moments import KeySums
from megatron_router_upcycling.training import launch


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
    sample = router_sample.RouterInput(args, args.router_samples, ranks)
    losses = run_over_data(args, model, sums, sample)
    sums.all_reduce()
    inputs = sample.gather(args.num_layers) if sample.num_tokens else None
    torch.distributed.all_reduce(losses)
    if args.rank == 0:
        write(args, sums, inputs, losses)


def new_sums(args: Namespace) -> KeySums:
    """Empty sums of the whole model's size, on this rank's device."""
    heads, groups, size = args.num_attention_heads, num_query_groups(args), args.kv_channels
    return KeySums(args.num_layers, heads, groups, size, torch.cuda.current_device())


def run_over_data(
    args: Namespace, model: list[torch.nn.Module], sums: KeySums, sample: router_sample.RouterInput
) -> torch.Tensor:
    """Fill ``sums`` and ``sample`` from the training data; what ``forward`` gives, summed."""
    data = train_iterators(args, len(model), args.collect_iters)
    tokens_per_batch = args.global_batch_size * args.seq_length
    losses = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    with (
        capture.capture_router_input(model, sample) if sample.num_tokens else contextlib.nullcontext(),
        capture.capture_keys(model, sums, args.key_source),
        tqdm(
            total=args.collect_iters * tokens_per_batch,
            desc="collecting keys",
            unit="token",
            unit_scale=True,
            disable=args.quiet or args.rank != 0 or None,
        ) as progress,
    ):
        for _ in range(args.collect_iters):
            losses += forward(args, model, data)
            torch.cuda.synchronize()
            progress.update(tokens_per_batch)
    return losses


def write(args: Namespace, sums: KeySums, inputs: torch.Tensor | None, losses: torch.Tensor) -> None:
    """Write ``--output`` from what all ranks saw, and say so in a line."""
    loss_sum, loss_tokens = losses.tolist()
    metadata = provenance(args) | {"lm_loss": loss_sum / loss_tokens}
    seen, expected = sums.tokens, metadata["tokens"]
    if seen != expected:
        raise RuntimeError(f"key statistics: {seen} tokens seen where {expected} were read")
    stats = KeyStats(sums.mean(), torch.full((args.num_layers,), seen), sums.attended(), metadata, inputs)
    if not stats.mean.isfinite().all():
        raise UserError(f"--load {args.load}: the model's keys hold NaN or infinite values; train it again")
    key_stats_file.save(args.output, stats, args.overwrite)
    print(
        f"{args.output}: {args.key_source} keys of {args.num_layers} layers x {num_query_groups(args)}"
        f" query groups over {expected} tokens; LM loss of the dense model {metadata['lm_loss']:.4f}",
        flush=True,
    )


def check_flags(flags: Namespace) -> None:
    """Refuse what can be refused before Megatron is imported."""
    if flags.output is None:
        raise UserError("--output: name the file to write, such as key_stats.safetensors")
    key_stats_file.check_output(flags.output, flags.overwrite)
    if flags.router_samples < 0:
        raise UserError(f"--router-samples {flags.router_samples}: must be 0 (none) or more")
    if flags.collect_iters < 1:
        raise UserError(f"--collect-iters {flags.collect_iters}: must be at least 1")


def check(run: launch.Run) -> None:
    """Refuse what does not fit the checkpoint or the data, before anything is built and on every rank."""
    from megatron_router_upcycling.training.data import check_data, check_tokens

    args = run.args
    dense = open_dense(args.load)
    if holds_experts(dense.tensors) or getattr(dense.common.get("args"), "num_experts", None):
        raise UserError(
            f"--load {args.load}: is a Mixture-of-Experts already; keys are collected from the dense"
            " checkpoint that it was made from"
        )
    if not described.gives_architecture(dense.common.get("args")):
        dense = open_dense(args.load, args.config and Path(args.config))
        read_model(dense)
    trained = dense.args
    if run.router is not None:
        raise UserError(
            f"--num-experts {args.num_experts}: keys are collected from a dense model; use the"
            " configuration that the dense checkpoint was trained with"
        )
    groups = num_query_groups(args)
    names = (ARCHITECTURE | NEGATED).values()
    compared = {name: (getattr(args, name, None), getattr(trained, name, None)) for name in names}
    # Megatron's argument is 1 without grouped-query attention, until a run sets it to the number of heads.
    compared["num_query_groups"] = (groups, num_query_groups(trained))
    for name, (asked, found) in compared.items():
        if asked != found and hasattr(trained, name):
            raise UserError(
                f"--config {args.config}: {name} {asked}, but the checkpoint {args.load} was trained with"
                f" {found}; use the configuration of its training"
            )
    if groups < args.tensor_model_parallel_size:
        raise UserError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: is more than the model's"
            f" {groups} query groups; use at most {groups}"
        )
    check_data(args)
    check_tokens(args, args.load)


def num_query_groups(args: Namespace) -> int:
    """Number of key heads; Megatron's argument counts only under grouped-query attention."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def load_model(args: Namespace) -> list[torch.nn.Module]:
    """This rank's chunks of the dense model in ``--load``, in evaluation mode, without an optimizer."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    args.skip_train = True  # neither an optimizer nor gradient buffers
    args.finetune = True  # weights alone, and the data from its beginning
    args.no_load_optim = args.no_load_rng = True
    args.exit_on_missing_checkpoint = True
    args.rerun_mode = "disabled"  # as in Megatron's own evaluation
    args.cuda_graph_impl = "none"  # a replayed graph would call no Python, and so capture no key
    # By the module's attribute, which the CPU backend replaces.
    training.initialize_megatron()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        checkpointing_context={},
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.eval()
    return model


def train_iterators(args: Namespace, num_chunks: int, iterations: int) -> Any:
    """Iterators over ``iterations`` global batches of the training data, as Megatron's loop has them.

    One iterator, or under virtual pipeline parallelism a list with one for each model chunk.
    """
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_router_upcycling.training.language_model import datasets_provider

    args.skip_train = False  # Megatron reads no training data with it
    args.train_iters, args.train_samples = iterations, None
    args.eval_iters, args.eval_interval = 0, iterations
    chunks: list[int | None] = (
        [None] if args.virtual_pipeline_model_parallel_size is None else list(range(num_chunks))
    )
    iterators: list[Iterator | None] = []
    for vp_stage in chunks:
        provider = partial(datasets_provider, vp_stage=vp_stage)
        provider.is_distributed = True  # type: ignore[attr-defined]
        iterators.append(build_train_valid_test_data_iterators(provider)[0])
    if not args.do_train:
        raise UserError(f"--split {args.split}: leaves no training data to run over")
    return iterators[0] if chunks == [None] else iterators


def forward(args: Namespace, model: list[torch.nn.Module], data: Any) -> torch.Tensor:
    """Run one global batch forward through Megatron's pipeline schedule.

    Returns:
        float64 [2] on this rank: the sum of the token losses and their number; zeros on ranks that do
        not hold the last pipeline stage.
    """
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
    losses = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        losses += report["lm loss"]
    return losses


def provenance(args: Namespace) -> dict[str, Any]:
    """What the statistics are of and what made them, as JSON values."""
    from megatron.training.utils import get_blend_and_blend_per_split

    dense = open_dense(args.load)
    blend, per_split = get_blend_and_blend_per_split(args)
    blend = per_split[0] if per_split else blend
    recorded = (
        "key_source num_layers kv_channels num_attention_heads hidden_size"
        " seq_length global_batch_size micro_batch_size split seed config"
        " tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size data_parallel_size"
    )
    return {name: getattr(args, name) for name in recorded.split()} | {
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
