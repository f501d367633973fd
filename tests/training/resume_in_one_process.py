"""Save an optimizer that has stepped, and load it at other learning rates, all in one process of each rank.

Usage: as ``-m megatron_router_upcycling.pretrain``. Rank 0 prints a line for each way of loading: the
learning rates that every group then has, or the error.
"""

import sys
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import launch
from megatron_router_upcycling.training.train import model_config

RATE, OTHER = 5e-3, 1e-3
OVERRIDE, USE_CHECKPOINT = "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"
DECAY = {"start_weight_decay": 0.3, "end_weight_decay": 0.3}
WAYS: dict[str, dict[str, Any]] = {
    "as before": {},
    "lr": {"lr": OTHER},
    "lr, override": {"lr": OTHER, OVERRIDE: True},
    "lr, use checkpoint": {"lr": OTHER, USE_CHECKPOINT: True},
    "min-lr": {"min_lr": OTHER / 10},
    "weight-decay": DECAY,
    "weight-decay, override": {OVERRIDE: True} | DECAY,
    "weight-decay, use checkpoint": {USE_CHECKPOINT: True} | DECAY,
}


def main() -> None:
    args = launch.prepare(sys.argv[1:]).args
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_timers, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    run = launch.Run(args, None)
    training.initialize_megatron()

    def set_up() -> Any:
        return training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, model_config(run)),
            checkpointing_context={},
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    model, optimizer, scheduler = set_up()
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(0.01)
    optimizer.step()
    scheduler.step(args.global_batch_size)
    moments = moments_of(optimizer)
    training.save_checkpoint(1, model, optimizer, scheduler, 0)
    before = dict(vars(args)) | {"load": args.save}
    for way, changes in WAYS.items():
        vars(args).update(before | changes)
        try:
            _, optimizer, scheduler = set_up()
        except UserError as error:
            get_timers()("load-checkpoint").stop()  # which Megatron has started
            tell(args, f"{way}: {error}")
            continue
        torch.testing.assert_close(moments_of(optimizer), moments, rtol=1e-6, atol=0)
        groups = optimizer.param_groups
        rates = {group["lr"] for group in groups}
        decays = {group["weight_decay"] for group in groups if group["wd_mult"]}
        scheduler.step(args.global_batch_size)
        assert rates == {group["lr"] for group in groups}  # the style is constant
        tell(
            args, f"{way}: lr {rates}, weight decay {decays}, {len(optimizer.chained_optimizers)} optimizers"
        )


def moments_of(optimizer: Any) -> torch.Tensor:
    """For each parameter on this rank its number of elements, the sums of Adam's states, and Adam's step."""
    states = [s for o in optimizer.chained_optimizers for s in o.optimizer.state.values()]
    names = ("exp_avg", "exp_avg_sq", "step")
    rows = [[float(s["exp_avg"].numel()), *(float(s[name].double().sum()) for name in names)] for s in states]
    return torch.tensor(sorted(rows), dtype=torch.float64)


def tell(args: Any, line: str) -> None:
    if args.rank == 0:
        sys.stdout.write(f"{line}\n")  # in one piece: Megatron logs to the same place
        sys.stdout.flush()


if __name__ == "__main__":
    launch.exit_on_user_error(main)
