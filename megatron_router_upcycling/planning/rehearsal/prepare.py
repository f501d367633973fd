"""Flags and files into one rank of a run of any size: what a rehearsal changes in Megatron's arguments."""

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import reading, setup
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training import device, launch

TOKENS_ON_CPU = 256  # of a micro-batch; activations grow with tokens and are scaled up


@dataclass(frozen=True)
class Rehearsal:
    """One rank that is ready to step, and the whole run as it is configured."""

    run: launch.Run
    planned: Setup


def prepare(argv: list[str], gpus: str = "--gpus") -> Rehearsal:
    """What ``launch.prepare`` does for training, for one rank of which the others are not there.

    Args:
        argv: flags as ``pretrain`` takes them, with the number of GPUs.
        gpus: the flag by which errors name that number.
    """
    request = launch.parse(argv)
    flags = request.flags
    check_flags(flags, gpus)
    launch.stand_alone(flags.rehearse_rank, flags.rehearse)
    origin = launch.find_origin(request, save=None)
    place = device.choose(flags.device)
    args, router = launch.merge(request, origin, place)
    configured = dict(vars(args))
    launch.adapt(args, place)
    planned = plan(args, configured, router, gpus)
    cut_down(args, planned, place)
    launch.validate(args)
    launch.set_global(args)
    return Rehearsal(launch.Run(args, router, origin.load), planned)


def check_flags(flags: Namespace, gpus: str) -> None:
    """Refuse what can be refused before Megatron is imported."""
    size, rank, tokens = flags.rehearse, flags.rehearse_rank, flags.rehearse_seq_length
    if size is None:
        raise UserError(f"{gpus}: give the number of GPUs of the run")
    if size < 1:
        raise UserError(f"{gpus} {size}: must be the number of GPUs of the run, at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{gpus} {size}: is one process; start it with python -m, not torchrun")
    if not 0 <= rank < size:
        raise UserError(f"--rehearse-rank {rank}: must be between 0 and {size - 1}")
    if tokens is not None and tokens < 1:
        raise UserError(f"--rehearse-seq-length {tokens}: must be at least 1")
    if flags.output and not (folder := Path(flags.output).absolute().parent).is_dir():
        raise UserError(f"--output {flags.output}: there is no folder {folder}; make it first")


def plan(args: Namespace, configured: dict[str, Any], router: RouterConfig | None, gpus: str) -> Setup:
    """The run as ``router-upcycle plan`` sees it.

    Args:
        configured: the arguments before ``launch.adapt`` changed them for this machine.
    """
    if args.vocab_size is None and args.padded_vocab_size is None:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        from megatron_router_upcycling.training import objections

        with objections.tokenizer_named(args):
            build_tokenizer(args)  # sets the padded size
    values = {name: value for name, value in configured.items() if name != "router"}
    values |= {"padded_vocab_size": args.padded_vocab_size, "world_size": args.rehearse}
    planned = reading.from_values(values, router.to_dict() if router else {}, gpus)
    setup.check(planned, gpus)
    return planned


def cut_down(args: Namespace, planned: Setup, place: str) -> None:
    """Set ``args`` for one step of one rank: no data, no tokenizer, no files, the fewest micro-batches."""
    args.fake_process_group = True
    # Tokens go to experts by lot, after the router has done its work: an untrained router may leave an expert
    # without any, and then what the missing ranks would send does not add up.
    args.moe_router_force_load_balancing = planned.num_experts is not None
    args.mock_data = True
    args.data_path = args.train_data_path = args.valid_data_path = args.test_data_path = None
    args.data_args_path = args.per_split_data_args_path = args.split = None
    args.padded_vocab_size = planned.vocabulary
    args.tokenizer_type, args.vocab_size = "NullTokenizer", planned.vocabulary
    args.load = args.pretrained_checkpoint = args.save = None
    args.async_save = args.use_persistent_ckpt_worker = False
    args.tensorboard_dir = args.wandb_project = None
    args.rerun_mode = "disabled"
    args.rampup_batch_size = None
    args.train_iters, args.train_samples = planned.steps or 1, None
    args.lr_decay_samples, args.lr_warmup_samples = None, 0
    args.global_batch_size = (
        planned.micro_batch * planned.data_parallel_size * planned.pipeline_model_parallel_size
    )
    args.eval_global_batch_size = args.eval_micro_batch_size = None
    if args.rehearse_seq_length or place == "cpu":
        # Context and tensor parallel ranks each take an equal part of a sequence.
        multiple = 2 * planned.context_parallel_size * planned.tensor_model_parallel_size
        few = max(1, TOKENS_ON_CPU // planned.micro_batch // multiple) * multiple
        args.seq_length = min(planned.sequence, args.rehearse_seq_length or few)
