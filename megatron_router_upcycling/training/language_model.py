"""GPT pretraining as Megatron sees it: the datasets, one batch, one forward step, the loss.

Shared by ``pretrain`` and ``collect_keys``. All parts are Megatron's own; its wheel holds the training loop
but not the script that combines them (``pretrain_gpt.py``).
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_router_upcycling.data.agreement import check_ids
from megatron_router_upcycling.errors import OneRankError, UserError
from megatron_router_upcycling.training.data import sequences_per_dataset

FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
stragglers = StragglerDetector()  # Megatron's, which --log-straggler sets up
SPIKE_FACTOR = 10.0  # a loss this many times the largest seen so far is called a spike
# Field of Megatron's GPTDatasetConfig -> the argument that sets it, if that has another name.
DATASET_FIELDS = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "inter_document_masking": "dataloader_inter_document_masking",
}
# Fields that no argument sets.
NO_ARGUMENT = ("drop_last_partial_validation_sequence", "add_extra_token_to_sequence")
FIM_TOKENS = ("prefix", "middle", "suffix", "pad", "eod")


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's configuration of the datasets: each of its fields from the argument that sets it."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    listed = args.per_dataset_sequences_path
    values = {
        "blend": blend,
        "blend_per_split": blend_per_split,
        "tokenizer": build_tokenizer(args),
        "sequences_per_dataset": sequences_per_dataset(listed) if listed else None,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "fim_extra_tokens": {name: getattr(args, f"fim_{name}_token") for name in FIM_TOKENS},
    }
    kind = GPTFIMDatasetConfig if args.fim_data else GPTDatasetConfig
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in NO_ARGUMENT]
    arguments = {name: DATASET_FIELDS.get(name, name) for name in names if name not in values}
    read = {name: getattr(args, argument) for name, argument in arguments.items() if hasattr(args, argument)}
    return kind(**read, **{name: value for name, value in values.items() if name in names})


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets for ``num_samples`` (train, valid, test) sequences."""
    args = get_args()
    is_read = parallel_state.get_tensor_model_parallel_rank() == 0 and reads_data(args, vp_stage)
    kind = MockGPTDataset if args.mock_data else GPTFIMDataset if args.fim_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: is_read, dataset_config(args)).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # read by Megatron's data loaders


def reads_data(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs tokens or labels."""
    return is_first_or_last_pipeline_stage(vp_stage) or predicts_more_tokens(args, vp_stage)


def predicts_more_tokens(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage has layers of multi-token prediction, which embed tokens themselves."""
    if not args.mtp_num_layers:
        return False
    layout = core_transformer_config_from_args(args).pipeline_model_parallel_layout
    return mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def embedding_ranks(pipeline: list[int]) -> list[int]:
    """The ranks of a pipeline that hold the embedding, with multi-token prediction."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    ends = pipeline[:1] if args.untie_embeddings_and_output_weights else [pipeline[0], pipeline[-1]]
    return sorted({*ends, *get_mtp_ranks(pipeline, config)})


def get_batch(data_iterator: Iterator[dict], vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro-batch on this rank: FIELDS, each [micro-batch, sequence on this rank] or None.

    The first tensor-parallel rank reads and broadcasts; each context-parallel rank keeps a slice. The first
    pipeline stage gets tokens, the last one labels, and one with multi-token prediction gets both.
    """
    args = get_args()
    if not reads_data(args, vp_stage):
        return dict.fromkeys(FIELDS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        try:  # while it is on the CPU: on a GPU this would be a device-side assertion without a name
            check_ids("--data-path: a batch", int(sample["tokens"].max()), args.padded_vocab_size)
        except UserError as error:
            raise OneRankError(str(error)) from None
        for name in FIELDS:
            value = sample.get(name)
            batch[name] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_more_tokens(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses in nats, number of tokens, and both as the dict that Megatron reports.

    ``losses`` and ``loss_mask`` (1 for tokens that count) are [micro-batch, sequence].
    """
    args = get_args()
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    check = get_rerun_state_machine().validate_result
    if args.check_for_nan_in_loss_and_grad:
        for rejects, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            check(loss, rejects, f"found {what} in the loss of this rank", tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        is_large = get_rerun_state_machine().is_unexpectedly_large
        is_spike = partial(is_large, threshold=SPIKE_FACTOR, context="loss")
        check(loss, is_spike, "loss spike", tolerance=0.0, fatal=False)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def forward_step(
    data_iterator: Iterator[dict], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """Run ``model`` on the next micro-batch; return its output and the loss function to apply to it.

    With ``return_schedule_plan`` (``--overlap-moe-expert-parallel-comm``) nothing runs yet, and Megatron's
    plan, which interleaves two micro-batches, is returned in place of the output.
    """
    with stragglers(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    run = model.build_schedule_plan if return_schedule_plan else model
    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    with stragglers:
        output = run(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"])
