"""Run a single rank of a larger run on this machine for one step, and compare it with the plan.

    python -m megatron_router_upcycling.rehearse --config moe.yaml --load MOE --gpus 64 [any flag of pretrain]

The rank builds its own shard of the model, its gradient buffers and its share of the optimizer. The other
ranks are not started, and no data or tokenizer is needed. Sizes are real; the loss is not.

Examples:
    # the last of 64 ranks, with figures as JSON
    python -m megatron_router_upcycling.rehearse --config moe.yaml --load MOE --gpus 64 --rehearse-rank 63 \\
        --output figures.json
    # try another parallel layout than the file's
    python -m megatron_router_upcycling.rehearse --config moe.yaml --load MOE --gpus 64 \\
        --expert-model-parallel-size 8
"""

import sys

from megatron_router_upcycling.planning.rehearsal import rehearse
from megatron_router_upcycling.training import launch

if __name__ == "__main__":
    launch.exit_on_user_error(lambda: rehearse(sys.argv[1:]))
