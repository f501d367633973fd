"""Whether a run can resume with the optimizer's state in its checkpoint, as its flags are."""

from argparse import Namespace
from pathlib import Path

from megatron_router_upcycling.checkpoint.open import format_of, open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.errors import UserError

# What the layout of a run is beside its number of ranks, by Megatron's arguments.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "context_parallel_size",
)


def check_format(args: Namespace, load: str) -> None:
    """Refuse a checkpoint of a format that this run's ``--ckpt-format`` cannot load."""
    found, asked = format_of(load, args.ckpt_step), args.ckpt_format
    if found is None or asked in (found, "torch_dist"):
        return  # or Megatron's own check: torch_dist looks for itself
    way_out = "leave out this flag and fully sharded data parallelism"
    if asked == "torch":
        way_out = "convert it first, with --ckpt-convert-format torch --ckpt-convert-save FOLDER"
    raise UserError(f"--ckpt-format {asked}: loads no other format, and {load} is {found}; {way_out}")


def check(args: Namespace, load: str) -> None:
    """Refuse flags with which Megatron's optimizer is another one than that of the checkpoint in ``load``."""
    if args.skip_train or args.finetune or args.no_load_optim:
        return
    try:
        saved = _saved_arguments(load, args.ckpt_step)
    except UserError:
        return  # of a format or without arguments that this package reads; Megatron goes its own way
    if saved is None or getattr(saved, "no_save_optim", False):
        return
    # With Muon the distributed optimizer keeps whole matrices by rank.
    by_rank = bool(getattr(saved, "use_layer_wise_distributed_optimizer", False))
    then = _optimizer_of(saved, by_rank)
    for flag, value in _optimizer_of(args, by_rank).items():
        if value != then[flag]:
            raise UserError(
                f"{flag} {value}: the checkpoint in {load} was saved with {then[flag]}, and the optimizer's"
                " state is laid out for that; give it in the flags or the YAML file as it was then, or pass"
                " --no-load-optim to begin with a fresh optimizer and learning-rate schedule"
            )


def _optimizer_of(args: Namespace, by_rank: bool) -> dict[str, object]:
    """What decides on the layout of the optimizer's state, by flags; a checkpoint may lack some arguments."""
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


def _saved_arguments(load: str, step: int | None) -> Namespace | None:
    """The arguments of the run that saved the checkpoint; None where that was no training run."""
    root = Path(load)
    if step is not None:
        checkpoint = Checkpoint.open_folder(root, root / f"iter_{step:07d}")
    else:
        checkpoint = open_checkpoint(root)
    return None if checkpoint.iteration_dir.name == "release" else checkpoint.args
