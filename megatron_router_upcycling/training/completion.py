"""What a run's arguments leave open: filled in where one value is meant, else asked for in one line.

Megatron's parser lets these pass, and its loop then stumbles over None, 0 or an assertion without a word.
"""

from argparse import Namespace

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.objections import flag_of

ARCHITECTURE = (
    "give the architecture, in flags or --config, or --load a converted checkpoint, which brings it"
)
REQUIRED = {
    "hidden_size": ARCHITECTURE,
    "num_attention_heads": ARCHITECTURE,
    "seq_length": "give the tokens of a sequence",
    "max_position_embeddings": "give at least --seq-length",
    "micro_batch_size": "give the sequences of a micro-batch",
}
AT_LEAST_ONE = (
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "log_interval",
    "tensorboard_log_interval",
)
NOT_NEGATIVE = ("eval_iters", "min_lr", "lr", "lr_warmup_init", "weight_decay")


def complete(args: Namespace) -> list[str]:
    """Fill in, before Megatron's own checks, what they and its loop read; return a line for each."""
    if not (args.num_layers or args.encoder_num_layers or args.hybrid_layer_pattern):
        raise UserError(f"--num-layers: is missing; {ARCHITECTURE}")
    for name, way in REQUIRED.items():
        if getattr(args, name) is None:
            raise UserError(f"{flag_of(name)}: is missing; {way}")
    for least, names in ((1, AT_LEAST_ONE), (0, NOT_NEGATIVE)):
        for name in names:
            value = getattr(args, name)
            if value is not None and not value >= least:
                raise UserError(f"{flag_of(name)} {value}: must be at least {least}")
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        args.train_iters = 0
    length = max(args.train_iters or args.train_samples or 0, 0)
    lines = []
    if args.eval_interval is None or not args.eval_iters:
        args.eval_interval = length + 1  # at the end there is an evaluation in any case
        if args.eval_iters and not args.skip_train:
            lines.append("--eval-interval is not given: validation comes at the end only")
    if args.save and args.save_interval is None:
        args.save_interval = length + 1
        lines.append("--save-interval is not given: a checkpoint is saved at the end and on --exit-* only")
    for name in ("eval_interval", "save_interval"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{flag_of(name)} {value}: must be at least 1")
    return lines


def check_training(args: Namespace) -> None:
    """Refuse, before anything is built, what a training run cannot have: a length, a rate, a layout."""
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UserError(
            "--override-opt-param-scheduler, --use-checkpoint-opt-param-scheduler: give one of the two"
        )
    if args.skip_train:
        return
    tensor_parallel = args.tensor_model_parallel_size
    if args.num_experts and tensor_parallel > 1 and not args.sequence_parallel:
        raise UserError(
            f"--tensor-model-parallel-size {tensor_parallel}: a Mixture-of-Experts trains so only with"
            " --sequence-parallel; give that too"
        )
    unit = "samples" if args.train_samples else "iters"
    length = args.train_samples or args.train_iters
    if not length or length < 0:
        given = ": is missing" if length is None else f" {length}: is no length"
        raise UserError(f"--train-iters{given}; give 1 or more, or --skip-train to train nothing")
    if args.lr is None:
        raise UserError("--lr: is missing; give the learning rate")
    for name in ("min_lr", "lr_warmup_init"):
        if (value := getattr(args, name)) > args.lr:
            raise UserError(f"{flag_of(name)} {value}: is more than --lr {args.lr}")
    decay = getattr(args, f"lr_decay_{unit}")
    if decay is not None and decay < 1:
        raise UserError(f"--lr-decay-{unit} {decay}: must be at least 1")
    decay = decay or length
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        if not 0 <= args.lr_warmup_fraction < 1:
            raise UserError(f"--lr-warmup-fraction {args.lr_warmup_fraction}: must be from 0 to less than 1")
    elif warmup >= decay:
        raise UserError(
            f"--lr-warmup-{unit} {warmup}: must be less than --lr-decay-{unit} {decay} (default: the run's"
            " length)"
        )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(f"--lr-decay-style WSD: give --lr-wsd-decay-{unit}")
    if args.end_weight_decay < args.start_weight_decay:
        raise UserError(
            f"--end-weight-decay {args.end_weight_decay}: is less than --start-weight-decay"
            f" {args.start_weight_decay}"
        )
