"""Average the key vectors of a frozen dense model over batches of its training data.

    torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config configs/demo/dense.yaml \\
        --load DENSE --output key_stats.safetensors [--collect-iters 10] [--overwrite] \\
        [--quiet] [any Megatron flag]

Paper, section 3.2. The model runs in evaluation mode, without an optimizer, at any tensor, pipeline, context
and data parallel size, over the first --collect-iters global batches of the training data. The statistics
cover every token of every rank; the hidden states of --router-samples tokens are kept as well.
"""

import sys
from argparse import Namespace

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import launch


def main() -> None:
    argv = sys.argv[1:]
    check_flags(launch.parse(argv).flags)
    import torch

    from megatron_router_upcycling.key_statistics import collect

    collect.collect(launch.prepare(argv, needs_checkpoint=True))
    torch.distributed.destroy_process_group()


def check_flags(flags: Namespace) -> None:
    """Refuse what can be refused before PyTorch and Megatron are imported."""
    if flags.output is None:
        raise UserError("--output: name the file to write, such as key_stats.safetensors")
    if flags.router_samples < 0:
        raise UserError(f"--router-samples {flags.router_samples}: must be 0 (none) or more")
    if flags.collect_iters < 1:
        raise UserError(f"--collect-iters {flags.collect_iters}: must be at least 1")
    from megatron_router_upcycling.key_statistics.file import check_output

    check_output(flags.output, flags.overwrite)


if __name__ == "__main__":
    launch.exit_on_user_error(main)
