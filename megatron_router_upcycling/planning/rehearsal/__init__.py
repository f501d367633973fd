"""Run one real rank of a run of any size, and compare it with the plan."""

import os
from argparse import Namespace
from pathlib import Path

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training import launch


def rehearse(argv: list[str]) -> None:
    """Rehearse one rank with the flags of ``pretrain``."""
    request = launch.parse(argv)
    _check_flags(request.flags)
    from megatron_router_upcycling.planning.rehearsal import run

    run.rehearse(request)


def _check_flags(flags: Namespace) -> None:
    """Refuse what can be refused before Megatron is imported."""
    size, tokens = flags.rehearse, flags.rehearse_seq_length
    if size is None or size < 1:
        raise UserError("--gpus: give the number of GPUs of the run, at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--gpus {size}: is one process; start it with python -m, not torchrun")
    if not 0 <= flags.rehearse_rank < size:
        raise UserError(f"--rehearse-rank {flags.rehearse_rank}: must be between 0 and {size - 1}")
    if tokens is not None and tokens < 1:
        raise UserError(f"--rehearse-seq-length {tokens}: must be at least 1")
    if flags.output and not (folder := Path(flags.output).absolute().parent).is_dir():
        raise UserError(f"--output {flags.output}: there is no folder {folder}; make it first")
