"""Whether a run can resume with the optimizer's state in its checkpoint, as its flags are."""

from argparse import Namespace
from pathlib import Path

from megatron_router_upcycling.checkpoint.open import format_of, open_checkpoint
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.objections import flag_of

# What the layout of a run is, by Megatron's arguments.
LAYOUT = (
    "world_size",
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
    for flag, has, had in (
        ("--use-distributed-optimizer", _distributed(args), _distributed(saved)),
        ("--bf16 (or --fp16)", _mixed(args), _mixed(saved)),
        ("--decoupled-lr", args.decoupled_lr is not None, _of(saved, "decoupled_lr") is not None),
        ("--apply-wd-to-qk-layernorm", args.apply_wd_to_qk_layernorm, _of(saved, "apply_wd_to_qk_layernorm")),
    ):
        if bool(has) != bool(had):
            how, way = (
                ("with", "give it, in the flags or the YAML file") if had else ("without", "leave it out")
            )
            raise UserError(
                f"{flag}: the checkpoint in {load} was saved {how} it, and the optimizer's state is laid out"
                f" for that; {way}, or pass --no-load-optim to begin with a fresh optimizer and schedule"
            )
    # With Muon it keeps whole matrices by rank, and Megatron says: for fixed DP usage only.
    for name in LAYOUT if _of(saved, "use_layer_wise_distributed_optimizer") else ():
        if (has := getattr(args, name)) != (had := _of(saved, name)):
            where = "ranks" if name == "world_size" else flag_of(name)
            raise UserError(
                f"{where} {has}: the checkpoint in {load} was saved with {had}, and Muon's"
                " distributed optimizer resumes at the same layout alone; give"
                f" {had}, or --no-load-optim to begin with a fresh optimizer and schedule"
            )
    if (optimizer := _of(saved, "optimizer")) != args.optimizer:
        raise UserError(
            f"--optimizer {args.optimizer}: the checkpoint in {load} holds the state of {optimizer}; give"
            f" --optimizer {optimizer}, or --no-load-optim to begin with a fresh optimizer and schedule"
        )


def _saved_arguments(load: str, step: int | None) -> Namespace | None:
    """The arguments of the run that saved the checkpoint; None where that was no training run."""
    root = Path(load)
    if step is not None:
        checkpoint = Checkpoint.open_folder(root, root / f"iter_{step:07d}")
    else:
        checkpoint = open_checkpoint(root)
    return None if checkpoint.iteration_dir.name == "release" else checkpoint.args


def _of(saved: Namespace, name: str) -> object:
    return getattr(saved, name, None)


def _distributed(args: Namespace) -> bool:
    """Whether the optimizer is distributed, by any of Megatron's two kinds."""
    return bool(_of(args, "use_distributed_optimizer") or _of(args, "use_layer_wise_distributed_optimizer"))


def _mixed(args: Namespace) -> bool:
    """Whether the optimizer's layout depends on 16-bit parameters, and they are: not when distributed."""
    return not _of(args, "use_distributed_optimizer") and bool(_of(args, "bf16") or _of(args, "fp16"))
