"""Whether a run can resume with the optimizer's state in its checkpoint, as its flags are."""

from argparse import Namespace
from pathlib import Path

from megatron_router_upcycling.checkpoint.open import format_of, open_checkpoint
from megatron_router_upcycling.config.flags import flag_of
from megatron_router_upcycling.errors import UserError

# What the layout of a run is beside its number of ranks: the sizes of these kinds of parallelism.
LAYOUT = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert")]
LAYOUT += ["context_parallel_size"]


def check(args: Namespace, load: str) -> None:
    """Refuse flags with which Megatron cannot load ``load``, or makes another optimizer than that one's."""
    found, asked = format_of(load, args.ckpt_step), args.ckpt_format
    if found is not None and asked not in (found, "torch_dist"):  # for which Megatron looks itself
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
        return  # of a format or without arguments that this package reads; Megatron goes its own way
    if checkpoint.iteration_dir.name == "release" or getattr(saved, "no_save_optim", False):
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
