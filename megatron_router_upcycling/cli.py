"""``router-upcycle``: the commands that run in one process, without Megatron.

Torch is imported only once a command's arguments are known to be right, so that ``--help`` and mistakes
answer at once.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_router_upcycling import __version__
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.router_config import GROUPINGS, POOLINGS, ROUTERS, RouterConfig

CONVERT_EXAMPLE = """\
example:
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config dense.yaml \\
      --load ckpt/dense --output ckpt/key_stats.safetensors
  router-upcycle convert ckpt/dense ckpt/moe --key-stats ckpt/key_stats.safetensors --num-experts 8 --top-k 2
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config moe.yaml \\
      --load ckpt/moe --save runs/moe

DENSE and OUT are checkpoint roots: the folder of latest_checkpointed_iteration.txt. OUT names the bytes of
each expert once, whatever --num-experts, and hard-links what does not change: DENSE may be deleted, but its
files must not be written over in place (by training that saves the same iteration again). --materialize
makes a checkpoint that shares nothing.

what to expect of the first step:
  --moe-router-pre-softmax      softmax over all experts, then top-k (the paper): the k weights sum to less
                                than 1, the FFN's output shrinks by that sum and the loss jumps; the router
                                learns from the first step
  --no-moe-router-pre-softmax   top-k, then softmax: exactly the dense model; the LM loss gives the router no
                                gradient until the experts differ
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="router-upcycle",
        description="Turn a dense Megatron checkpoint into a Mixture-of-Experts by Router Upcycling.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_convert(commands)
    _add_inspect(commands)
    return parser


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a Mixture-of-Experts checkpoint of a dense one",
        description="Make a Mixture-of-Experts checkpoint of a dense one (torch_dist to torch_dist). Any"
        " tensor, pipeline and expert parallel size loads it.",
        epilog=CONVERT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    convert.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's checkpoint")
    convert.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to make")
    convert.add_argument("--key-stats", metavar="FILE", type=Path, help="what collect_keys wrote for DENSE")
    convert.add_argument("--num-experts", type=int, default=8, help="experts a layer (default: 8)")
    convert.add_argument("--top-k", type=int, default=2, help="experts a token goes to (default: 2)")
    convert.add_argument("--router", choices=ROUTERS, default="mixture", help="linear is vanilla upcycling")
    convert.add_argument("--num-routers", type=int, help="routers in the mixture (default: --num-experts)")
    convert.add_argument(
        "--pooling", choices=POOLINGS, default="sum", help="how scores combine (default: sum)"
    )
    convert.add_argument(
        "--grouping", choices=GROUPINGS, default="greedy", help="how heads are paired (default: greedy)"
    )
    convert.add_argument(
        "--seed", type=int, default=1234, help="of --router linear's weights (default: 1234)"
    )
    convert.add_argument(
        "--moe-router-pre-softmax",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="softmax before top-k (default), or after; see below",
    )
    convert.add_argument("--materialize", action="store_true", help="real copies; share no bytes with DENSE")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    convert.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    convert.add_argument("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(run=_convert)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is and list its tensors",
        description="Say what a torch_dist checkpoint is and list its tensors. Nothing in it is executed.",
        allow_abbrev=False,
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint's root folder")
    inspect.add_argument("--all", action="store_true", help="list optimizer state and extra states as well")
    inspect.set_defaults(run=_inspect)


def _convert(args: argparse.Namespace) -> None:
    router = RouterConfig(
        router=args.router,
        num_experts=args.num_experts,
        top_k=args.top_k,
        num_routers=args.num_routers,
        pooling=args.pooling,
        grouping=args.grouping,
        pre_softmax=args.moe_router_pre_softmax,
    )
    import torch

    from megatron_router_upcycling import conversion
    from megatron_router_upcycling.upcycle import Options

    torch.set_num_threads(1)  # the work is moving bytes; more threads only wait for each other
    start = time.monotonic()
    options = Options(router, args.key_stats, args.seed, args.materialize, args.overwrite)
    ready = conversion.prepare(args.dense, args.out, options)
    if args.dry_run:
        print(conversion.describe_plan(ready))
        return
    from tqdm import tqdm

    with tqdm(
        total=ready.bytes_to_write, unit="B", unit_scale=True, desc="convert", leave=False, disable=args.quiet
    ) as bar:
        # The few bytes around each chunk are not in the total.
        record = conversion.convert(ready, lambda count: bar.update(min(count, bar.total - bar.n)))
    if not args.quiet:
        print(conversion.describe_result(ready, record, time.monotonic() - start))


def _inspect(args: argparse.Namespace) -> None:
    from megatron_router_upcycling import inspection

    print(inspection.describe(args.checkpoint, everything=args.all))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 2 after a user's mistake, 130 or 143 when interrupted."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # unwinds, so that half-made folders are removed

    signal.signal(signal.SIGTERM, stop)
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `router-upcycle inspect … | head`
        sys.stderr.close()
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
