"""Train a dense or an upcycled model with Megatron's own training loop.

    torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config configs/demo/moe.yaml \\
        --load MOE --save OUT [any Megatron flag]

An upcycled checkpoint records its router and architecture (router_upcycling.json): no flags are needed for
them. To resume a stopped run, run the same command again: it starts from the last checkpoint in --save.

Examples:
    # override the file's learning rate, and save a checkpoint every 500 steps
    torchrun ... -m megatron_router_upcycling.pretrain --config moe.yaml --load MOE --save OUT \\
        --lr 1e-4 --save-interval 500
    # a Mixture-of-Experts from scratch, with a linear router
    torchrun ... -m megatron_router_upcycling.pretrain --config moe.yaml --save OUT --num-experts 8 \\
        --router linear
    # evaluate only: the loss on held-out data
    torchrun ... -m megatron_router_upcycling.pretrain --config moe.yaml --load OUT --skip-train
    # before reserving GPUs: run one rank of 64 on this machine (same as megatron_router_upcycling.rehearse)
    python -m megatron_router_upcycling.pretrain --config moe.yaml --load MOE --rehearse 64
"""

import sys

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import launch
from megatron_router_upcycling.training.train import train


def pretrain(argv: list[str]) -> None:
    flags = launch.parse(argv).flags
    if flags.rehearse is not None:
        from megatron_router_upcycling.planning.rehearsal import rehearse

        rehearse(argv)
    elif flags.rehearse_rank or flags.rehearse_seq_length is not None:
        raise UserError("--rehearse-rank, --rehearse-seq-length: need --rehearse WORLD_SIZE")
    else:
        run = launch.prepare(argv)
        from megatron_router_upcycling.diagnostics.routing_start import warn_of_ties

        if run.load and run.router and run.args.rank == 0 and (warning := warn_of_ties(run.load)):
            print(warning, flush=True)
        train(run)


if __name__ == "__main__":
    launch.exit_on_user_error(lambda: pretrain(sys.argv[1:]))
