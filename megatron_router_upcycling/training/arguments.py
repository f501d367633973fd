"""Megatron's arguments: what is refused by name, and what is filled in.

Megatron-LM's programs share one parser. Flags that only other programs read (retrievers, vision models,
reinforcement learning), or only ``pretrain_gpt.py`` outside the training loop, would have no effect here.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.errors import UserError

LEAVE_OUT = "leave it out"
# Refused argument -> what to do instead.
NOT_TAKEN = {
    "dataloader_inter_document_masking": "give --reset-attention-mask and --reset-position-ids, which keep"
    " attention within documents that end with the end-of-document token",
    "hybrid_context_parallel": "give --context-parallel-size alone",
    **dict.fromkeys(("decoder_seq_length", "encoder_seq_length"), "give --seq-length"),
    "yaml_cfg": "name a file of flags' values with --config",
    **dict.fromkeys(("sft", "sample_rate", "mask_prob", "short_seq_prob", "logits_load_dir"), LEAVE_OUT),
    "moe_routing_trace_dump_weights": LEAVE_OUT,
}
# Refused groups of Megatron's parser; of their flags, this training reads --no-data-sharding alone.
GROUPS = ("biencoder", "vision", "rl", "In-process restart")

REQUIRED = ("hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings", "micro_batch_size")
LEAST = {"eval_iters": 0, "weight_decay": 0, "seq_length": 1, "log_interval": 1, "eval_interval": 1}
LEAST |= {"save_interval": 1, "tensorboard_log_interval": 1, "routing_diagnostics_interval": 1}
# The parallel sizes which, with the number of ranks, are the layout of a run.
LAYOUT = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "expert_model", "context")]


def refuse_what_is_not_taken(parser: ArgumentParser) -> None:
    """Make Megatron's ``parser`` refuse the arguments that are not taken, as flags or as later defaults."""
    refused = []
    for group in parser._action_groups:
        for action in group._group_actions:
            advice = NOT_TAKEN.get(action.dest) or (LEAVE_OUT if group.title in GROUPS else None)
            if advice and action.dest != "data_sharding":
                refused.append((action.dest, action.option_strings[0], action.default, advice))
    parse = parser.parse_args

    def parse_args(*given: Any) -> Namespace:
        args = parse(*given)
        for name, flag, default, advice in refused:
            if (value := getattr(args, name)) != default:
                value = "" if isinstance(value, bool) else f" {value}"
                raise UserError(f"{flag}{value}: is no part of this training; {advice}")
        return args

    parser.parse_args = parse_args  # type: ignore[assignment, method-assign]


def complete(args: Namespace) -> list[str]:
    """Fill in missing arguments before Megatron's own checks, or raise; return notices to print."""
    required = {"num_layers": args.num_layers or args.encoder_num_layers or args.hybrid_layer_pattern}
    for name, value in (required | {name: getattr(args, name) for name in REQUIRED}).items():
        if value is None:
            raise UserError(
                f"{flag_of(name)}: is missing; give it in flags or --config, or --load a converted"
                " checkpoint, which brings the model's architecture"
            )
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        args.train_iters = 0
    length = max(args.train_iters or args.train_samples or 0, 0)
    lines = []
    if args.eval_interval is None or not args.eval_iters:
        args.eval_interval = length + 1  # Megatron always evaluates at the end
        if args.eval_iters and not args.skip_train:
            lines.append("--eval-interval is not given: validation comes at the end only")
    if args.save and args.save_interval is None:
        args.save_interval = length + 1
        lines.append("--save-interval is not given: a checkpoint is saved at the end and on --exit-* only")
    for name, least in LEAST.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"{flag_of(name)} {value}: must be at least {least}")
    return lines


def check(args: Namespace) -> None:
    """After Megatron's own checks, refuse arguments with which the run would fail later."""
    trains, tensor_parallel = not args.skip_train, args.tensor_model_parallel_size
    fraction = args.lr_warmup_fraction
    for fails, message in (
        (
            trains and args.num_experts and tensor_parallel > 1 and not args.sequence_parallel,
            f"--tensor-model-parallel-size {tensor_parallel}: a Mixture-of-Experts can be trained with it"
            " only with --sequence-parallel; give that too",
        ),
        (
            trains and not (args.train_samples or args.train_iters or 0) > 0,
            "--train-iters: give 1 or more, or --skip-train to train nothing",
        ),
        (trains and args.lr is None, "--lr: is missing; give the learning rate"),
        (
            trains and fraction is not None and not 0 <= fraction < 1,
            f"--lr-warmup-fraction {fraction}: must be from 0 to less than 1",
        ),
        (
            args.optimizer == "adaptive_muon",
            "--optimizer adaptive_muon: fails at its first step in Megatron-Core 0.19; give --optimizer muon",
        ),
        (
            args.optimizer == "soap" and args.save and not args.no_save_optim,
            "--optimizer soap: Megatron-Core 0.19 cannot save its state; give --no-save-optim, or another",
        ),
        (
            args.use_layer_wise_distributed_optimizer
            and not (args.bf16 and (args.distributed_backend == "nccl" or args.data_parallel_size == 1)),
            "--use-distributed-optimizer: with Muon and its kin it needs --bf16 and NCCL; leave it out",
        ),
        (
            args.use_megatron_fsdp and args.save and args.swiglu and not (args.bf16 or args.fp16),
            "--use-megatron-fsdp: Megatron-Core 0.19 cannot save such a run in float32; give --bf16",
        ),
        (
            "sinkhorn" in _list(args.moe_router_load_balancing_type) and any(_list(args.moe_aux_loss_coeff)),
            "--moe-router-load-balancing-type sinkhorn: has no auxiliary loss; give --moe-aux-loss-coeff 0",
        ),
    ):
        if fails:
            raise UserError(message)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_schedule(args: Namespace) -> None:
    """Let Megatron's scheduler check rates and lengths before building. Call after ``set_global``."""
    from megatron.training import training

    from megatron_router_upcycling.training.objections import megatrons_objection

    before = dict(vars(args))
    try:
        with megatrons_objection(args):
            training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:  # the call above changes some arguments
        vars(args).clear()
        vars(args).update(before)


def check_resuming(args: Namespace, load: str) -> None:
    """Refuse flags with which Megatron cannot load ``load``, or would build another kind of optimizer."""
    from megatron_router_upcycling.checkpoint.open import format_of, open_checkpoint

    found, asked = format_of(load, args.ckpt_step), args.ckpt_format
    if found is not None and asked not in (found, "torch_dist"):  # with torch_dist Megatron detects it
        way_out = "leave out this flag and fully sharded data parallelism"
        if asked == "torch":
            way_out = "convert it first, with --ckpt-convert-format torch --ckpt-convert-save FOLDER"
        raise UserError(f"--ckpt-format {asked}: loads no other format, and {load} is {found}; {way_out}")
    if args.skip_train or args.finetune or args.no_load_optim:
        return
    step = args.ckpt_step
    try:
        checkpoint = open_checkpoint(Path(load) if step is None else Path(load, f"iter_{step:07d}"))
        saved = checkpoint.args
    except UserError:
        return  # a format, or stored arguments, that this package cannot read: left to Megatron
    if checkpoint.iteration_dir.name == "release" or getattr(saved, "no_save_optim", False):
        return
    # With Muon the distributed optimizer keeps whole matrices by rank.
    by_rank = bool(getattr(saved, "use_layer_wise_distributed_optimizer", False))
    then = _optimizer_of(saved, by_rank)
    for flag, value in _optimizer_of(args, by_rank).items():
        if value != then[flag]:
            raise UserError(
                f"{flag} {value}: the checkpoint in {load} was saved with {then[flag]}, and the optimizer's"
                " state is laid out for that; give the same in the flags or the YAML file, or pass"
                " --no-load-optim to begin with a fresh optimizer and learning-rate schedule"
            )


def _optimizer_of(args: Namespace, by_rank: bool) -> dict[str, object]:
    """The flags that decide the layout of the optimizer's state; a checkpoint may lack some arguments."""
    given = {name: value for name, value in vars(args).items() if value}
    distributed = "use_distributed_optimizer" in given
    layout = {flag_of(name): given.get(name) for name in LAYOUT} | {"ranks": given.get("world_size")}
    return {
        "--use-distributed-optimizer": distributed or "use_layer_wise_distributed_optimizer" in given,
        "--bf16 (or --fp16)": not distributed and ("bf16" in given or "fp16" in given),
        "--decoupled-lr": getattr(args, "decoupled_lr", None) is not None,
        "--apply-wd-to-qk-layernorm": "apply_wd_to_qk_layernorm" in given,
        "--optimizer": given.get("optimizer"),
        **(layout if by_rank else {}),
    }
