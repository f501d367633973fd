"""Average the key vectors of a frozen dense model over batches of its training data.

    torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config configs/demo/dense.yaml \\
        --load DENSE --output key_stats.safetensors [--collect-iters 10] [--key-source pre_rope|post_rope] \\
        [--overwrite] [--quiet] [any Megatron flag]

Paper, section 3.2. The model runs in evaluation mode at any tensor, pipeline, context and data
parallelism, over the first ``--collect-iters`` global batches of the training data; no optimizer is
built. The statistics cover every token of every rank (``key_stats``); ``--router-samples`` of them leave
their hidden states in the file as well (``router_input``).
"""

import sys

import torch

from megatron_router_upcycling.key_statistics.collect import check_flags, collect
from megatron_router_upcycling.training import launch


def main() -> None:
    def command() -> None:
        check_flags(launch.read_early(sys.argv[1:]).flags)
        collect(launch.prepare(sys.argv[1:], needs_checkpoint=True))
        torch.distributed.destroy_process_group()

    launch.exit_on_user_error(command)


if __name__ == "__main__":
    main()
