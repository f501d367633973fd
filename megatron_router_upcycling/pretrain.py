"""Train a dense or an upcycled model with Megatron's own training loop.

    torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config configs/demo/moe.yaml \\
        --load MOE --save OUT [any Megatron flag]

An upcycled checkpoint brings its router's options and architecture with it (``router_upcycling.json``).
Where ``--save`` holds a checkpoint already, the run goes on from there, so that a run that was stopped is
continued by the same command.
"""

import sys

from megatron_router_upcycling.training.launch import exit_on_user_error, prepare
from megatron_router_upcycling.training.train import train


def main() -> None:
    def command() -> None:
        run = prepare(sys.argv[1:])
        if run.rehearsed is None:
            train(run)
            return
        from megatron_router_upcycling.planning.rehearsal import run as rehearsal

        rehearsal.run(run, run.rehearsed, run.load)

    exit_on_user_error(command)


if __name__ == "__main__":
    main()
