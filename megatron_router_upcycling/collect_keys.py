"""Average the key vectors of a frozen dense model over batches of its training data.

    torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config configs/demo/dense.yaml \\
        --load DENSE --output key_stats.safetensors [--collect-iters 10] [--overwrite] \\
        [--quiet] [any Megatron flag]

Paper, section 3.2. The model runs in evaluation mode, without an optimizer, at any tensor, pipeline, context
and data parallel size, over the first --collect-iters global batches of the training data. The statistics
cover every token of every rank; the hidden states of --router-samples tokens are kept as well.
"""

import sys

from megatron_router_upcycling.training import launch


def main() -> None:
    import torch

    from megatron_router_upcycling.key_statistics import collect

    argv = sys.argv[1:]
    collect.check_flags(launch.parse(argv).flags)
    collect.collect(launch.prepare(argv, needs_checkpoint=True))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    launch.exit_on_user_error(main)
