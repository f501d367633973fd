"""GPT pretraining as Megatron sees it: the datasets, one batch, one forward step, the loss.

Shared by ``pretrain`` and ``collect_keys``. Everything is Megatron's own (``GPTDataset``,
``get_batch_on_this_tp_rank``, ``get_batch_on_this_cp_rank``); the wheel holds the training loop but not
the script that binds these together.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.data import agreement
from megatron_router_upcycling.errors import OneRankError, UserError

FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
SPIKE_FACTOR = 10.0  # a loss this many times the largest seen so far is called a spike


def check_data(args: Namespace) -> None:
    """Refuse data that is not there, before anything is built.

    Raises:
        UserError: names the flag, or the file that is missing.
    """
    paths = _prefixes(args)
    if not paths and not args.mock_data:
        raise UserError("--data-path: name the data to run over (the prefix of a .bin and an .idx file)")
    for path in paths:
        for file in (f"{path}.bin", f"{path}.idx"):
            if "://" not in path and not Path(file).is_file():
                raise UserError(f"--data-path {path}: no file {file}; name the prefix of a .bin and an .idx")


def check_tokens(args: Namespace, load: str | None) -> None:
    """Refuse data of another tokenizer, or with tokens that the model does not know. After ``set_global``.

    Args:
        load: the checkpoint that the run starts from; what stands beside it is its tokenizer.

    Raises:
        UserError: names the data.
    """
    beside_load = beside.tokenizer_in(Path(load)) if load else None
    named = Path(args.tokenizer_model) if args.tokenizer_model else None
    tokenizer = beside_load[1] if beside_load else named
    known = tokenizer if tokenizer and tokenizer.exists() else None
    agreement.check([path for path in _prefixes(args) if "://" not in path], known, args.padded_vocab_size)


def _prefixes(args: Namespace) -> list[str]:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [path for part in (blend, *(blend_per_split or ())) if part for path in part[0]]


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets for ``num_samples`` (train, valid, test) sequences."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
    )

    def is_built_here() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(
            vp_stage
        )

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # read by Megatron's data loaders


def get_batch(data_iterator: Iterator[dict], vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro-batch on this rank: FIELDS, each [micro-batch, sequence on this rank] or None.

    The first tensor-parallel rank reads; the others receive; context parallelism keeps a slice. Only
    the first pipeline stage gets tokens and only the last one labels.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(FIELDS)
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        try:  # on the CPU still: a GPU would end with an assertion that names nothing
            agreement.check_ids("--data-path: a batch", int(sample["tokens"].max()), args.padded_vocab_size)
        except UserError as error:
            raise OneRankError(str(error)) from None
        batch = {
            name: sample[name].cuda(non_blocking=True) if sample.get(name) is not None else None
            for name in FIELDS
        }
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
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses, number of tokens, and the pair as Megatron reports it.

    Args:
        loss_mask: [micro-batch, sequence], 1 where a token counts.
        losses: [micro-batch, sequence], cross entropy in nats.
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
        is_spike = partial(
            get_rerun_state_machine().is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss"
        )
        check(loss, is_spike, "loss spike", tolerance=0.0, fatal=False)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Iterator[dict], model: Any) -> tuple[torch.Tensor, Callable]:
    """Run ``model`` on the next micro-batch; return its output and the loss function to apply to it."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])
