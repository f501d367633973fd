"""Flags that Megatron's parser takes and this training would pass over, refused by name at the start.

Megatron-LM's programs share one parser. What other programs read (its retrievers, vision models and
reinforcement learning), and what its ``pretrain_gpt.py`` does outside the loop that this package runs, would
change nothing here, without a word.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron_router_upcycling.errors import UserError

UNREAD = "nothing in Megatron's training reads it; leave it out"
# Argument -> why it is not taken and what to do.
FLAGS = {
    "dataloader_inter_document_masking": "is not supported; give --reset-attention-mask and"
    " --reset-position-ids, which keep attention within documents that end with the end-of-document token",
    "sft": "this trains on documents, not on conversations; leave it out",
    "hybrid_context_parallel": "packs conversations, and this trains on documents; give"
    " --context-parallel-size alone",
    "decoder_seq_length": "is for models with an encoder; give --seq-length",
    "encoder_seq_length": "is for models with an encoder; give --seq-length",
    "sample_rate": UNREAD,
    "mask_prob": UNREAD,
    "short_seq_prob": UNREAD,
    "logits_load_dir": "distillation from stored logits is not supported; leave it out",
    "moe_routing_trace_dump_weights": "reads a gate that these routers do not have; leave it out",
    "yaml_cfg": "is not supported; name a file of flags' values with --config",
}
# Groups of Megatron's parser for what this training is not, and what of them it reads all the same.
GROUPS = {
    "biencoder": "is for Megatron's retrievers; leave it out",
    "vision": "is for Megatron's vision models; leave it out",
    "rl": "is for Megatron's reinforcement learning; leave it out",
    "In-process restart": "is not supported; scripts/launch.sh and Slurm start a run again",
}
READ = ("data_sharding",)


# What Megatron-Core 0.19 takes and fails at later, after minutes or at the first save: when, and what to say.
COMBINATIONS: tuple[tuple[Callable[[Namespace], bool], str], ...] = (
    (
        lambda args: args.optimizer == "adaptive_muon",
        "--optimizer adaptive_muon: fails at its first step in Megatron-Core 0.19; give --optimizer muon",
    ),
    (
        lambda args: args.optimizer == "soap" and args.save and not args.no_save_optim,
        "--optimizer soap: Megatron-Core 0.19 cannot save its state; give --no-save-optim, or another one",
    ),
    (
        lambda args: (
            args.use_layer_wise_distributed_optimizer
            and not (args.bf16 and (args.distributed_backend == "nccl" or args.data_parallel_size == 1))
        ),
        "--use-distributed-optimizer: with Muon and its kin it needs --bf16 and NCCL; leave it out",
    ),
    (
        lambda args: args.use_megatron_fsdp and args.save and args.swiglu and not (args.bf16 or args.fp16),
        "--use-megatron-fsdp: Megatron-Core 0.19 cannot save such a run in float32; give --bf16",
    ),
    (
        lambda args: (
            "sinkhorn" in _list(args.moe_router_load_balancing_type) and any(_list(args.moe_aux_loss_coeff))
        ),
        "--moe-router-load-balancing-type sinkhorn: has no auxiliary loss; give --moe-aux-loss-coeff 0",
    ),
)


def check(args: Namespace) -> None:
    """Refuse, once Megatron has validated its arguments, what fails later."""
    for holds, message in COMBINATIONS:
        if holds(args):
            raise UserError(message)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def install(parser: ArgumentParser) -> None:
    """Let ``parser``, as Megatron made it, refuse what is not taken, in flags and in later defaults."""
    refused = []
    for group in parser._action_groups:
        for action in group._group_actions:
            why = FLAGS.get(action.dest) or GROUPS.get(group.title or "")
            if why and action.dest not in READ:
                refused.append((action.dest, action.option_strings[0], action.default, why))
    parse = parser.parse_args

    def parse_args(*given: Any) -> Namespace:
        args = parse(*given)
        for name, flag, default, why in refused:
            if (value := getattr(args, name)) != default:
                raise UserError(f"{flag}{'' if isinstance(value, bool) else f' {value}'}: {why}")
        return args

    parser.parse_args = parse_args  # type: ignore[assignment, method-assign]
